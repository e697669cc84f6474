"""What an ablation takes from test speakers is said wherever its figures stand."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from made_voices import put_corpus, recipe
from stores import store

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.experiments.finetune import FinetuneConfig, finetune
from cpcscale.experiments.reproduce import run as reproduce
from cpcscale.experiments.reproduce.run import ReproduceConfig
from cpcscale.report.terminal.finetune import finetune_lines
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.store import TrackingConfig


def parts(folder: Path, system: str, **changes: Any) -> dict[str, Any]:
    base = recipe(put_corpus(folder / "tones"), system)
    given = {field.name: getattr(base, field.name) for field in fields(EmotionRecipe)}
    return given | {"run_dir": str(folder / "run")} | changes


def test_a_mark_stands_in_the_result_the_tracker_and_what_is_printed(tmp_path):
    tracking = TrackingConfig(uri=store(tmp_path))
    changes = {"speaker_norm": True, "svm_search": False, "workers": 1, "tracking": tracking}
    config = FinetuneConfig(**parts(tmp_path, "functionals", **changes))
    result = finetune(config)
    assert json.loads(Path(config.run_dir, "result.json").read_text())["marks"] == ["SPEAKER-ADAPTED"]
    (run,) = read_runs(tracking)
    assert run.tag("marks") == "SPEAKER-ADAPTED"
    assert "[SPEAKER-ADAPTED]" in next(finetune_lines(result.as_dict()))


def test_a_table_has_the_marks_of_any_of_its_systems(tmp_path):
    config = ReproduceConfig(
        **parts(tmp_path, "precpc", pretraining_on="corpus", systems=["mean", "random", "minicpc"])
    )
    corpus = open_corpus(config.corpus)
    plan = SimpleNamespace(config=config, corpus=corpus, folds=fold_splits(config, corpus))
    assert reproduce._marks(plan) == ("TRANSDUCTIVE",)
    config.systems.remove("minicpc")
    assert reproduce._marks(plan) == ()
