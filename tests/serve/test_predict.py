"""`cpcscale predict`: the same values from every input, tables and plots, and jobs that go on after a kill."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
import saved_recognisers
import soundfile
import torch
from made_voices import put_recogniser, recogniser

import cpcscale
from cpcscale import audio, storage
from cpcscale.audio import samples as audio_samples
from cpcscale.cli import main
from cpcscale.emotion.fitted import FittedClassifier, FittedRecogniser
from cpcscale.emotion.heads.svm import SupportClasses
from cpcscale.errors import AudioError, UserError
from cpcscale.handmade import functionals, mfcc
from cpcscale.model.cpc import ModelConfig
from cpcscale.runs import lease
from cpcscale.serve import inputs, predict
from cpcscale.serve.inputs import find_inputs
from cpcscale.serve.job import Job
from cpcscale.serve.predict import Asked, predict_files
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.packing import fetch

RATE = 16_000
# Each takes a fifth of a second to seconds, and up to 100 MB.
FITTING = ("sklearn", "scipy", "torch._dynamo", "pandas", "matplotlib", "ray", "mlflow")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return put_recogniser(tmp_path_factory.mktemp("model") / "precpc")


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3.3 s of a sweep, from 1.2 s to 2.2 s of digital silence."""
    wave = 0.3 * swollen(np.sin(np.arange(int(3.3 * RATE)) ** 1.5 / 300))
    wave[int(1.2 * RATE) : int(2.2 * RATE)] = 0
    path = tmp_path_factory.mktemp("long") / "long.wav"
    soundfile.write(path, wave, RATE, "PCM_16")
    return path


def swollen(wave: np.ndarray) -> np.ndarray:
    """With a level that changes as that of syllables; one that stays the same is no speech to a recogniser."""
    return (1 + 0.8 * np.sin(2 * np.pi * 6 * np.arange(len(wave)) / RATE)) / 2 * wave


@pytest.fixture(scope="module")
def shard_set(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of all tests, of audio that swells."""
    root = tmp_path_factory.mktemp("swollen")
    shutil.copytree(shard_set.parent.parent / "audio", root / "audio")
    for path in (root / "audio").rglob("*.wav"):
        wave, rate = soundfile.read(path)
        soundfile.write(path, swollen(wave), rate)
    pack(str(root / "audio"), str(root / "shards"), PackConfig(shard_mb=0.12))
    return root / "shards" / "train"


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def predicted(capsys: pytest.CaptureFixture, *words: object) -> list[dict[str, str]]:
    assert main(["predict", *map(str, words)]) == 0
    return rows_of(capsys.readouterr().out)


def test_one_file_a_batch_a_shard_member_and_two_workers_give_the_same(model, shard_set, tmp_path, capsys):
    files = sorted((shard_set.parent.parent / "audio").rglob("*.wav"))
    members = predicted(capsys, model, shard_set)
    assert len(members) == Index.load(str(shard_set)).count
    # The member of a file has its name, without the suffix.
    at = {row["file"].rpartition(":")[2]: row for row in members}
    loaded = cpcscale.load(model)
    batch = loaded.predict_many(files)
    for path, of_batch in zip(files, batch, strict=True):
        member = at[path.relative_to(shard_set.parent.parent / "audio").with_suffix("").as_posix()]
        assert member["file"].startswith(f"{shard_set}/shard-0")
        assert loaded.predict(path).unit == pytest.approx(of_batch.unit, abs=1e-5)
        assert float(member["activation"]) == pytest.approx(of_batch.activation, abs=1e-4)
    for workers in (1, 2):
        out = tmp_path / f"{workers}.csv"
        assert main(["predict", model, str(shard_set), "--workers", str(workers), "--out", str(out)]) == 0
        assert rows_of(out.read_text()) == members
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_a_job_that_is_killed_goes_on_and_does_no_part_twice(shard_set, tmp_path):
    model = put_recogniser(tmp_path / "slow", model=ModelConfig())
    out = tmp_path / "out.csv"
    words = [sys.executable, "-m", "cpcscale", "predict", model, str(shard_set), "--out", str(out)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not (done := list(Path(f"{out}.parts").glob("*.jsonl"))) and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in Path(f"{out}.parts").glob("*.jsonl")}
    total = Index.load(str(shard_set)).shards.num_rows
    assert 0 < len(done) < total and not out.exists()
    with pytest.raises(UserError, match="is being made of other audio"):
        predict_files(model, [str(shard_set)], str(out), asked=Asked(segments=1.0))
    made = []

    def run(function, items, *, shared=(), **_):
        for item in items:
            if shared:
                made.append(f"{item.number:06d}.jsonl")
                assert not set(done) & set(made)
            yield function(item, *shared)

    predict_files(model, [str(shard_set)], str(out), run=run)
    assert sorted([*done, *made]) == [f"{number:06d}.jsonl" for number in range(total)]
    assert not Path(f"{out}.parts").exists()
    predict_files(model, [str(shard_set)], str(tmp_path / "undisturbed.csv"))
    assert out.read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()
    manifest = json.loads(Path(f"{out}.manifest.json").read_text())
    assert manifest["model"] == cpcscale.load(model).digest and len(manifest["audio"]) == 64
    assert manifest["inputs"] == 24 and manifest["output"] == hashlib.sha256(out.read_bytes()).hexdigest()
    # What is complete is not going on: another start has to say that it replaces it.
    with pytest.raises(UserError, match="exists: give --force"):
        predict_files(model, [str(shard_set)], str(out))
    predict_files(model, [str(shard_set)], str(out), force=True)
    assert out.read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()


def test_a_job_that_goes_on_reads_again_what_could_not_be_read_and_nothing_else(model, long, tmp_path, monkeypatch):
    for number in range(4):
        shutil.copy(long, tmp_path / f"{number}.wav")
    files, out = [str(tmp_path / f"{number}.wav") for number in range(4)], tmp_path / "out.csv"
    monkeypatch.setattr(inputs, "_PART_FILES", 2)
    predict_files(model, files, str(tmp_path / "undisturbed.csv"))
    looked = []

    def start(fails: str) -> None:
        def opened(name: str, size: int):
            # The headers are read before, by the same door.
            if size == fetch.STREAM_BYTES:
                looked.append(Path(name).name)
                if looked[-1] == fails:
                    raise AudioError("unreadable", "the disk is away")
            return door(name, size)

        monkeypatch.setattr(fetch, "opened", opened)
        try:
            predict_files(model, files, str(out))
        finally:
            monkeypatch.setattr(fetch, "opened", door)

    door = fetch.opened
    with pytest.raises(RuntimeError), monkeypatch.context() as stopped:
        stopped.setattr(Job, "end", lambda *_: (_ for _ in ()).throw(RuntimeError))
        start("1.wav")
    assert looked == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert "unreadable" in Path(f"{out}.parts/000000.jsonl").read_text()
    looked.clear()
    start("")
    assert looked == ["1.wav"]
    assert out.read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()


def test_an_output_is_made_by_one_process_at_a_time_and_by_the_next_when_it_ends(model, long, tmp_path, capsys):
    out = f"{tmp_path}/out.csv"
    with lease.hold(f"{out}.lease", lease.LeaseConfig(), take_over=False, say=str):
        before = sorted(tmp_path.rglob("*"))
        for more in ([], ["--force"]):
            assert main(["predict", model, str(long), "--out", out, *more]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert f"{out} is being made by another process, pid {os.getpid()} on" in line
        assert sorted(tmp_path.rglob("*")) == before
    assert main(["predict", model, str(long), "--out", out]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.csv.manifest.json"]


def test_a_model_that_other_processes_cannot_read_is_sent_to_them(model, shard_set, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "here")

    def elsewhere(function, items, *, shared=(), **_):
        predict._kept.clear()
        (tmp_path / "here").rename(tmp_path / "gone")
        yield from (function(item, *shared) for item in items)

    outs = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    predict_files(model, [str(shard_set)], outs[0])
    predict_files(str(tmp_path / "here"), [str(shard_set)], outs[1], run=elsewhere, send=True)
    assert Path(outs[0]).read_bytes() == Path(outs[1]).read_bytes()


def test_a_table_in_the_folder_of_a_job_is_told(model, long, tmp_path, capsys):
    (tmp_path / "_ray_pkg_1").mkdir()
    for out, told in ((tmp_path / "a.csv", False), (tmp_path / "_ray_pkg_1" / "a.csv", True)):
        assert main(["predict", model, str(long), "--out", str(out)]) == 0
        assert ("lies in the job's temporary folder" in capsys.readouterr().err) == told


def test_a_recogniser_with_a_classifier_gives_a_column_of_categories(long, tmp_path, capsys):
    (tmp_path / "text.wav").write_text("no audio")
    found = {}
    for name, fitted in (("with", with_classifier()), ("without", recogniser("functionals"))):
        folder, out = saved_recognisers.put_recogniser(tmp_path / name, 0.5, fitted), tmp_path / f"{name}.parquet"
        assert main(["predict", folder, str(long), f"{tmp_path}/text.wav", "--out", str(out)]) == 1
        found[name] = pq.read_table(out)
        assert main(["predict", folder, str(long), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        many = cpcscale.load(folder).predict_many([long, tmp_path / "text.wav"])
        kept = saved_recognisers.model_of(folder).columns
        assert list(said) == list(found[name].column_names) == list(many.to_pandas()) == list(kept)
    assert "category" not in found["without"].column_names
    [one, none] = found["with"]["category"].to_pylist()
    assert one in ("angry", "glad", "sad") and none == "" and said["activation"] is not None
    [strict, _] = cpcscale.load(tmp_path / "with").predict_many([long, long], strict=True)
    assert strict.category == ("" if strict.reason else one)


def with_classifier() -> FittedRecogniser:
    made, rng = recogniser("functionals"), np.random.default_rng(1)
    width = len(functionals.NAMES)
    machine = SupportClasses(
        mean_F=np.zeros(width),
        deviation_F=np.full(width, 50.0),
        vector_VF=rng.normal(0, 1, (6, width)),
        gamma=np.array(0.02),
        class_V=np.repeat(np.arange(3), 2),
        dual_NV=rng.normal(0, 1, (2, 6)),
        intercept_Q=np.zeros(3),
    )
    return replace(made, classifier=FittedClassifier(machine, ("angry", "glad", "sad")))


def test_tables_of_each_kind_have_the_same_rows_and_all_places_may_be_in_a_store(model, long, tmp_path, s3, capsys):
    base = f"{s3.base}/predict/{tmp_path.name}"
    for name in storage.list_files(model):
        storage.write(f"{base}/model/{name}", Path(model, name).read_bytes())
    storage.write(f"{base}/audio/long.wav", long.read_bytes())
    storage.write(f"{base}/audio/text.wav", b"no audio")
    outs = [f"{tmp_path}/a.csv", f"{base}/b.jsonl", f"{tmp_path}/c.parquet"]
    for out in outs:
        assert main(["predict", f"{base}/model", f"{base}/audio", f"{base}/gone.wav", "--out", out, "--json"]) == 1
        assert json.loads(capsys.readouterr().out) == {"out": out, "inputs": 3, "without_value": 2, "rows": 3}
    of_csv = rows_of(Path(outs[0]).read_text())
    of_json = [json.loads(line) for line in storage.read(outs[1]).splitlines()]
    of_parquet = pq.read_table(outs[2]).to_pylist()
    assert [row["reason"] for row in of_csv] == ["", "unreadable", "missing"]
    for a, b, c in zip(of_csv, of_json, of_parquet, strict=True):
        assert tuple(a) == tuple(b) == tuple(c) == cpcscale.load(model).columns
        assert a == {name: "" if cell is None else str(cell) for name, cell in b.items()}
        assert {**b, "reason": b["reason"] or "", "flags": b["flags"] or ""} == c
    assert of_csv[0]["model"] == cpcscale.load(f"{base}/model").digest[:16] == cpcscale.load(model).digest[:16]
    assert not [name for name in storage.list_files(base) if ".parts" in name]


def test_segments_cover_the_file_and_each_is_predicted_as_a_file(model, long, tmp_path, capsys):
    rows = predicted(capsys, model, long, "--segments", "500ms")
    assert [(float(row["start_s"]), float(row["end_s"])) for row in rows] == [
        *((at / 2, at / 2 + 0.5) for at in range(6)),
        (3.0, 3.3),
    ]
    assert [row["reason"] for row in rows] == ["", "", "", "silent", "", "", ""]
    one = cpcscale.load(model).predict(long, segments=0.5)
    assert [str(part.row()["activation"]) for part in one.segments] == [row["activation"] for row in rows]
    assert one.reason == "" and one.seconds == pytest.approx(3.3) and one.start_s == 0
    wave, _ = soundfile.read(long, dtype="int16")
    assert cpcscale.load(model).predict(wave[RATE * 3 // 2 - 8000 :][:8000], RATE).unit == one.segments[2].unit
    # What is left and under .1 s belongs to the last segment.
    assert [row["end_s"] for row in predicted(capsys, model, long, "--segments", "1.625s")] == ["1.625", "3.3"]
    for wrong in ("10", "1m", "0s", "50ms", "-1s", "1e9999s"):
        assert main(["predict", model, str(long), f"--segments={wrong}"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("system", ["precpc", "functionals"])
def test_long_audio_never_lies_in_memory_and_gives_the_same(system, long, monkeypatch):
    made = recogniser(system)
    wave, _ = soundfile.read(long, dtype="int16")
    monkeypatch.setattr(audio_samples, "_IN_MEMORY", RATE)
    monkeypatch.setattr(mfcc, "_PIECE", RATE)
    with audio.open_samples(str(long)) as samples:
        np.testing.assert_array_equal(samples[:], wave)
        most = 0

        class Watched:
            def __len__(self) -> int:
                return len(samples)

            def __getitem__(self, part: slice) -> np.ndarray:
                nonlocal most
                most = max(most, len(samples[part]))
                return samples[part]

        found = made.predict([Watched()])
    assert most <= RATE
    monkeypatch.undo()
    np.testing.assert_allclose(found.unit_UP, made.predict([wave]).unit_UP, atol=1e-12)


def test_a_plot_shows_the_file_and_is_not_replaced_unsaid(model, long, tmp_path, capsys):
    png, folder = tmp_path / "a.png", tmp_path / "plots"
    predicted(capsys, model, long, "--segments", "1s", "--plot", png)
    assert matplotlib.image.imread(png).std() > 0.01
    (tmp_path / "text.wav").write_text("no audio")
    assert main(["predict", model, str(long), f"{tmp_path}/text.wav", str(long), "--plot", str(folder)]) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["000000-long.wav.png", "000002-long.wav.png"]
    capsys.readouterr()
    for plot, message in ((png, "exists"), (folder, "exists"), (tmp_path / "b.png", "name a folder")):
        files = [str(long)] * (1 + (plot.name == "b.png"))
        assert main(["predict", model, *files, "--plot", str(plot)]) == 2
        assert message in capsys.readouterr().err
    predicted(capsys, model, long, "--plot", png, "--force")
    assert main(["predict", model, str(long), str(long), "--plot", str(png), "--force"]) == 2
    assert "name a folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_is_one_line_and_leaves_nothing(model, long, tmp_path, capsys):
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    (tmp_path / "theirs.csv.parts").mkdir()
    (tmp_path / "folder.csv").mkdir()
    for words, message in (
        (["--out", f"{tmp_path}/a.xlsx"], ".csv, .jsonl, .parquet"),
        (["--out", str(taken)], "exists: give --force"),
        (["--out", f"{tmp_path}/theirs.csv", "--force"], "is not of a job"),
        (["--workers", "-1"], "give 1 or more"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "this process sees 0 GPUs: use cpu")]),
        (["--out", f"{tmp_path}/folder.csv", "--force"], "is a folder: name a file"),
        (["--out", f"{tmp_path}/short.csv", "--segments", "50ms"], "too short for speech"),
    ):
        assert main(["predict", model, str(long), *words]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv", "taken.csv", "theirs.csv.parts"]
    assert main(["predict", model, str(long), "--out", str(taken), "--force"]) == 0
    assert len(rows_of(taken.read_text())) == 1


def test_applying_a_recogniser_loads_nothing_that_only_fitting_needs(model, long):
    code = (
        f"import sys, cpcscale; cpcscale.load({model!r}).predict({str(long)!r}); "
        f"print([name for name in {FITTING!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_by_relative_names_are_measured_in_a_process_that_runs_elsewhere(long, tmp_path, monkeypatch):
    monkeypatch.chdir(long.parent)
    here = find_inputs([long.name], lambda function, items, **_: map(function, items))

    def elsewhere(function, items, **_):
        os.chdir(tmp_path)
        yield from map(function, items)

    assert find_inputs([long.name], elsewhere).digest == here.digest


def test_a_shard_set_is_taken_by_its_index_where_one_stands_and_a_list_as_spreadsheets_save_it(
    model, long, shard_set, tmp_path, monkeypatch, capsys
):
    (tmp_path / "list.txt").write_text(f"{long}\n", encoding="utf-8-sig")
    assert predicted(capsys, model, f"@{tmp_path}/list.txt")[0]["file"] == str(long)
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["predict", model, f"@{tmp_path}/empty.txt"]) == 2
    assert "names no file" in capsys.readouterr().err
    monkeypatch.chdir(shard_set)
    sets = [find_inputs([word], lambda *_: ()) for word in (".", "index.json")]
    assert sets[0].digest == sets[1].digest and sets[0].count == sets[1].count > 0


def test_a_table_for_pandas_has_numbers_and_a_path_by_itself_is_no_list(model, long):
    recogniser = cpcscale.load(model)
    found = recogniser.predict_many([long, "gone.wav"])
    table = found.to_pandas()
    assert table["activation"].mean() == pytest.approx(found[0].activation, abs=1e-4)
    assert np.isnan(table["valence_low"]).all() and list(table["reason"]) == ["", "missing"]
    assert found[1:].to_csv().count("missing") == 1
    for path in (str(long), long):
        with pytest.raises(UserError, match="is one path"):
            recogniser.predict_many(path)
    for samples in ([0.1, 0.0], [0.0], np.zeros(3), [np.zeros(3)]):
        with pytest.raises(UserError, match=r"this one has a (float|ndarray|float64): pass samples"):
            recogniser.predict_many(samples)
    with pytest.raises(UserError, match="a list is no audio: pass samples as a NumPy array with their rate, or a list"):
        recogniser.predict([0.1, 0.2])
