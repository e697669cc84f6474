"""The commands of docs/ that want nothing but the project are run as they stand, on a cut of its data.

What makes them small comes after what the page says, and stands in SMALL.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import mlflow
import pytest
import speech
from docs_pages import ROOT, to_run

from cpcscale.cli import main
from cpcscale.config import load
from cpcscale.experiments.finetune import FinetuneConfig
from cpcscale.experiments.many_runs_config import ReproduceConfig

SMALL = {
    "size": ["--update-rate", "100", "--decode-rate", "1000"],
    "pretrain": [
        *speech.TINY,
        "workers=1",
        "train.steps=4",
        "train.validate_every_steps=4",
        "checkpoint.every_steps=2",
    ],
    "finetune": ["workers=1", "fit.epochs=1", "svm_search=false"],
}


def _cut(name: str, folder: Path, speaker_files: int) -> None:
    """The first files of each speaker of a data set of the project, and its manifest for them."""
    source, target = ROOT / "tests" / "data" / name, folder / "tests" / "data" / name
    with (source / "manifest.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns, kept, seen = list(reader.fieldnames or ()), [], dict[str, int]()
        for row in reader:
            seen[row["speaker"]] = seen.get(row["speaker"], 0) + 1
            kept += [row] if seen[row["speaker"]] <= speaker_files else []
    target.mkdir(parents=True)
    for row in kept:
        (target / row["path"]).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(source / row["path"], target / row["path"])
    with (target / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)


def test_the_tutorial_leads_from_audio_to_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _cut("speech", tmp_path, 10)
    _cut("made_emotion", tmp_path, 4)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    said: dict[str, str] = {}
    for line in to_run():
        program, verb, *arguments = line.words
        assert program == "cpcscale", f"{line}: this test runs cpcscale alone; mark the block, or teach it {program}"
        status = main([verb, *arguments, *SMALL.get(verb, [])])
        out, err = capsys.readouterr()
        assert status == 0, f"{line}: {err}"
        # Those of the tutorial come first.
        said.setdefault(verb, out)
    assert "fingerprint" in said["pack"] and "unseen" in said["pack"]
    assert "problems    none" in said["audit"]
    assert "bottleneck" in said["size"]
    assert "InfoNCE accuracy" in said["pretrain"]
    assert "newest" in said["checkpoint"]
    # The pretraining logged the encoder to its MLflow run; to register it was to name it.
    registered = mlflow.MlflowClient("sqlite:///runs/mlflow.db").get_model_version_by_alias("encoder", "champion")
    assert registered.run_id == json.loads(Path("runs/tutorial/pretrain/run.json").read_text())["run_id"]
    table = said["compare"].splitlines()
    for system in ("precpc", "random", "functionals"):
        (row,) = [line for line in table if line.startswith(system)]
        assert "speakers3" in row and "MADE" in row
    assert (tmp_path / "runs" / "tutorial" / "report.html").stat().st_size > 10_000


def test_the_quickstart_ends_with_one_table_and_a_command_for_all_nine_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _cut("speech", tmp_path, 10)
    _cut("made_emotion", tmp_path, 4)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    import quickstart

    # With a system that trains nothing in place of the networks, and a tiny pretraining.
    stages = [
        ([*stage[0], *SMALL.get(stage[0][0], [])], *stage[1:])
        for stage in quickstart.STAGES
        if not {"system=random", "system=precpc"} & set(stage[0])
    ]
    monkeypatch.setattr(quickstart, "STAGES", stages)
    assert quickstart.quickstart() == 0
    said, _ = capsys.readouterr()
    assert said.count("InfoNCE accuracy") == 1 and "unseen" in said
    assert "by gender" not in said
    assert [line.split()[0] for line in said.splitlines() if "speakers3" in line] == ["functionals", "mean"]
    config = load(ReproduceConfig, quickstart.REPRODUCE)
    assert said.rstrip().endswith(f"cpcscale reproduce {quickstart.REPRODUCE}")
    assert config.systems == ReproduceConfig().systems
    assert config.encoder.checkpoint == f"{quickstart.RUNS}/pretrain"
    alone = load(FinetuneConfig, "configs/finetune/quickstart.yaml")
    for name in ("corpus", "protocol", "recogniser", "fit", "pretraining"):
        assert getattr(config, name) == getattr(alone, name), name
