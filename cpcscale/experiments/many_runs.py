"""Many fine-tunings below one tracked run: which are finished, and running the rest.

Each run has its own folder, so after a kill the next driver finds the finished results there. A folder with the result
of another config is refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale import storage
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders.networks import OpenedEncoder
from cpcscale.emotion.finetune_result import FinetuneResult
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.experiments.finetune import FinetuneConfig, finished_result
from cpcscale.experiments.many_runs_config import RECIPE_FIELDS
from cpcscale.progress import duration
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker


@dataclass(frozen=True)
class FinetuneRun:
    """One fine-tuning: its config, its opened corpus and encoder, and the digests that its result depends on."""

    config: FinetuneConfig
    corpus: Corpus
    opened: OpenedEncoder
    identity: dict[str, str]

    @property
    def name(self) -> str:
        return self.config.name


def run_config(
    recipe: EmotionRecipe, name: str, run_dir: str, workers: int, tracking: TrackingConfig
) -> FinetuneConfig:
    """The config of one run with this recipe, in the folder `name` below `run_dir`."""
    values = {field: getattr(recipe, field) for field in RECIPE_FIELDS}
    place = {"run_dir": storage.join(run_dir, name), "workers": workers, "tracking": tracking}
    return FinetuneConfig(**values | place | {"name": name})


def finished_results(runs: Sequence[FinetuneRun]) -> dict[str, FinetuneResult]:
    """The results of the finished runs, by name. Raises UserError for a folder with the result of another config."""
    found = {run.name: finished_result(run.config.run_dir, run.identity) for run in runs}
    return {name: result for name, result in found.items() if result is not None}


def dry_run_table(runs: Sequence[FinetuneRun], done: Mapping[str, FinetuneResult]) -> dict[str, Any]:
    """{dry_run, runs, done}: a row for each run with `name`, `system`, `seed`, `done` and `seconds` (None if not done),
    and how many are done."""
    rows = [
        {"name": run.name, "system": run.config.system, "seed": run.config.seed, "done": run.name in done}
        | {"seconds": done[run.name].seconds if run.name in done else None}
        for run in runs
    ]
    return {"dry_run": True, "runs": rows, "done": sum(row["done"] for row in rows)}


def run_remaining(
    runs: Sequence[FinetuneRun],
    done: dict[str, FinetuneResult],
    start: Callable[[FinetuneRun], FinetuneResult],
    say: Callable[[str], None],
) -> None:
    """Runs those that are not in `done`, one after the other, and adds their results to `done`."""
    todo = [run for run in runs if run.name not in done]
    for place, run in enumerate(todo):
        say(f"run {len(done) + 1} of {len(runs)}, {run.name}{_left(todo[place:], done)}")
        done[run.name] = start(run)


def publish(run_dir: str, tracker: Tracker, table: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Writes `files`, and then the table as results.json, to the run folder and to the tracked run."""
    for name, data in {**files, "results.json": (json.dumps(table, indent=1) + "\n").encode()}.items():
        tracker.artifact(name, data)
        storage.write(storage.join(run_dir, name), data)


@dataclass(frozen=True)
class UtterancePrediction:
    """A run's prediction for one utterance: its test fold, truth_P, and guess_P by condition ("" is clean audio)."""

    fold: int
    truth_P: np.ndarray
    guess_P: dict[str, np.ndarray]


def read_predictions(text: str) -> Iterator[tuple[str, UtterancePrediction]]:
    """Yields (key of the utterance, its prediction) for each row of a predictions.csv."""
    for row in csv.DictReader(io.StringIO(text)):
        ends = {"": "", **{name.partition("@")[2]: name[name.index("@") :] for name in row if "@" in name}}
        guess_P = {
            condition: np.array([float(row[f"{name}_hat{end}"]) for name in PRIMITIVES])
            for condition, end in ends.items()
        }
        yield (
            row["utterance"],
            UtterancePrediction(int(row["fold"]), np.array([float(row[name]) for name in PRIMITIVES]), guess_P),
        )


def metric_name(system: str) -> str:
    """The name of a system's mean CCC in the tracking store: MLflow takes no plus in one, as fusions have it."""
    return f"ccc_mean_{system.replace('+', '_')}"


def seconds_by_system(runs: Sequence[FinetuneRun], done: Mapping[str, FinetuneResult]) -> dict[str, float]:
    """The seconds that all runs of each system took together."""
    total: dict[str, float] = {}
    for run in runs:
        total[run.config.system] = total.get(run.config.system, 0.0) + done[run.name].seconds
    return total


def _left(todo: Sequence[FinetuneRun], done: Mapping[str, FinetuneResult]) -> str:
    """How long the runs may take, by the mean of those of their systems that are done; nothing where there is none."""
    known: dict[str, list[float]] = {}
    for result in done.values():
        known.setdefault(result.system, []).append(result.seconds)
    if not all(run.config.system in known for run in todo):
        return ""
    return f"; about {duration(sum(float(np.mean(known[run.config.system])) for run in todo))} left"
