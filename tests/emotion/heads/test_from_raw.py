"""From the owners' folder to the printed table and result.json by `cpcscale finetune`, and what bad audio does to it.

The config is the quickstart's with a small recogniser, as a user would pass it. Runs in this process share one Ray.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from made_corpora import put_iemocap, put_msp_podcast
from made_voices import put_checkpoint, put_corpus
from stores import store

from cpcscale import cli
from cpcscale.cluster import session
from cpcscale.emotion.scores.ccc import PRIMITIVES

CONFIG = str(Path(__file__).parents[3] / "configs" / "finetune" / "quickstart.yaml")
SMALL = ["recogniser.heads=2", "recogniser.hidden=16", "recogniser.dense=16", "fit.epochs=2", "fit.device=cpu"]
LABELS = "Labels/labels_consensus.csv"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the runs of this module are tracked."""
    return tmp_path_factory.mktemp("from-raw")


@pytest.fixture
def no_ray(monkeypatch) -> None:
    def connect(workers: int = 1) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(session, "connect", connect)


def arguments(place: Path, run_dir: Path, *more: str) -> list[str]:
    tracked = f"tracking.uri={store(place)}"
    return ["finetune", CONFIG, "workers=2", f"run_dir={run_dir}", tracked, *SMALL, *more]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with exit status 2; its progress is none."""
    assert cli.main(list(arguments)) == 2
    out, error = capsys.readouterr()
    assert out == ""
    [line] = [line for line in error.splitlines() if not line.startswith("reading ")]
    assert line.startswith("cpcscale: error: ")
    return line


def scored(run_dir: Path) -> dict[str, list[float]]:
    """The predictions of each utterance that was tested."""
    rows = csv.DictReader((run_dir / "predictions.csv").read_text().splitlines())
    return {row["utterance"]: [float(row[f"{name}_hat"]) for name in PRIMITIVES] for row in rows}


def assert_the_table_is_the_result(out: str, run_dir: Path) -> dict:
    stored = json.loads((run_dir / "result.json").read_text())
    head, *rows = [line for line in out.splitlines() if line]
    scored_on = "tested on the owner's test1" if stored["protocol"] == "official" else "pooled over the test folds"
    assert head == f"{stored['system']} on {stored['corpus']}, protocol {stored['protocol']}, {scored_on}"
    printed = {row.split()[1]: float(row.split()[2]) for row in rows if row.startswith("  CCC ")}
    assert printed == pytest.approx({name: stored["ccc"][name] for name in (*PRIMITIVES, "mean")}, abs=6e-4)
    assert np.isfinite(list(scored(run_dir).values())).all()
    assert len(scored(run_dir)) == sum(fold["test_utterances"] for fold in stored["folds"])
    return stored


@pytest.mark.parametrize("system", ["mfcc", "functionals"])
def test_a_folder_of_iemocap_runs_from_raw_files_to_the_table(place, tmp_path, capsys, system):
    folder = put_iemocap(tmp_path / "IEMOCAP_full_release", sessions=3)
    more = [f"system={system}", f"corpus.path={folder}", "protocol.split=loso"]
    assert cli.main(arguments(place, tmp_path / "run", *more)) == 0
    stored = assert_the_table_is_the_result(capsys.readouterr().out, tmp_path / "run")
    assert (stored["corpus"], stored["protocol"], stored["utterances"], stored["speakers"]) == (
        "iemocap",
        "loso",
        36,
        6,
    )
    assert [(fold["name"], fold["test_speakers"]) for fold in stored["folds"]] == [
        (f"Session{number}", [f"Ses0{number}F", f"Ses0{number}M"]) for number in (1, 2, 3)
    ]


@pytest.mark.parametrize("system", ["mfcc", "functionals"])
def test_a_folder_of_msp_podcast_runs_from_raw_files_to_the_table(place, tmp_path, capsys, system):
    folder = put_msp_podcast(tmp_path / "MSP-Podcast")
    more = [f"system={system}", f"corpus.path={folder}", "protocol.split=official"]
    assert cli.main(arguments(place, tmp_path / "run", *more)) == 0
    stored = assert_the_table_is_the_result(capsys.readouterr().out, tmp_path / "run")
    assert (stored["corpus"], stored["unknown"], stored["utterances"]) == ("msp-podcast", 10, 6)
    assert set(stored["ccc_by_part"]) == {"test1", "test2"}
    [fold] = stored["folds"]
    assert (fold["train_utterances"], fold["dev_utterances"], fold["test_utterances"]) == (12, 6, 12)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("podcast", [1, 4])
def test_an_official_split_with_a_speaker_on_both_sides_is_refused_and_the_speaker_named(
    place, tmp_path, capsys, podcast
):
    folder = put_msp_podcast(tmp_path / "MSP-Podcast")
    moved = f"MSP-PODCAST_{podcast:04}_0000.wav"
    lines = (folder / LABELS).read_text().splitlines()
    # Podcasts 1 and 4 are by speakers 0 and 3, of the training and of a test part.
    other = "Test1" if podcast == 1 else "Train"
    leaking = [f"{line.rpartition(',')[0]},{other}" if line.startswith(moved) else line for line in lines]
    assert leaking != lines
    (folder / LABELS).write_text("\n".join(leaking) + "\n")
    more = ["system=functionals", f"corpus.path={folder}", "protocol.split=official"]
    line = refused(capsys, *arguments(place, tmp_path / "run", *more))
    assert f"speaker '{podcast - 1}' is in the training and in the test part" in line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def spoilt(tmp_path) -> Path:
    """A corpus with an utterance of 0.12 s, one of 5 minutes, an empty and a missing file: 00, 01, 02 and 03."""
    folder = put_corpus(tmp_path / "tones")
    rng = np.random.default_rng(5)
    for name, seconds in (("00", 0.12), ("01", 300.0)):
        wave = 0.1 * np.sin(np.arange(int(seconds * 16_000)) * 0.1) + rng.normal(0, 0.02, int(seconds * 16_000))
        soundfile.write(folder / f"{name}.wav", wave, 16_000)
    (folder / "02.wav").write_bytes(b"")
    (folder / "03.wav").unlink()
    return folder


def test_very_short_and_long_speech_is_scored_and_bad_files_are_a_line_each(place, tmp_path, spoilt):
    """As a user runs it, in a process of its own; `max_s` is 10 s."""
    checkpoint = put_checkpoint(tmp_path / "pretrained")
    more = [f"corpus.path={spoilt}", "corpus.on_bad=skip", f"encoder.checkpoint={checkpoint}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "cpcscale", *arguments(place, tmp_path / "run", *more)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    stored = assert_the_table_is_the_result(done.stdout, tmp_path / "run")
    assert (stored["system"], stored["utterances"]) == ("precpc", 34)
    assert stored["dropped"] == {"no audio file": 1, "empty audio file": 1}
    names = scored(tmp_path / "run")
    assert "Traceback" not in done.stderr
    assert {"00", "01"} <= set(names) and not {"02", "03"} & set(names)
    [empty] = [line for line in done.stderr.splitlines() if "02" in line]
    assert empty == f"cpcscale: tones: left out 02, {spoilt}/02.wav: the file has no bytes"
    [missing] = [line for line in done.stderr.splitlines() if "03" in line]
    assert missing == "cpcscale: tones: 03 is left out: no audio file"


@pytest.mark.usefixtures("no_ray")
def test_bad_files_stop_a_run_with_one_line_unless_told_otherwise(place, tmp_path, spoilt, capsys):
    more = arguments(place, tmp_path / "run", "system=functionals", f"corpus.path={spoilt}")
    line = refused(capsys, *more)
    assert f"1 of 36 audio files are not where the labels say, the first {spoilt}/03.wav" in line
    soundfile.write(spoilt / "03.wav", 0.1 * np.sin(np.arange(4000)), 16_000)
    line = refused(capsys, *more)
    assert f"1 of 36 audio files cannot be used (1 empty), the first {spoilt}/02.wav of 02" in line
    assert "corpus.on_bad=skip" in line
    assert not (tmp_path / "run").exists()
