"""Several fine-tunings below one tracked run: which are done, and what is left.

Each run has a folder of its own, by which a driver that comes after a kill knows what is finished; what another config
put there is refused, never mixed in.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders.networks import OpenedEncoder
from cpcscale.emotion.finetune_result import FinetuneResult
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.experiments.finetune import FinetuneConfig, finished
from cpcscale.experiments.many_runs_config import RECIPE_FIELDS
from cpcscale.progress import duration
from cpcscale.tracking.tracker import Tracker, TrackingConfig


@dataclass(frozen=True)
class FinetuneRun:
    """One fine-tuning: its config, its corpus and encoder, and digests of what its result follows from."""

    config: FinetuneConfig
    corpus: Corpus
    opened: OpenedEncoder
    identity: dict[str, str]

    @property
    def name(self) -> str:
        return self.config.name


def single(recipe: EmotionRecipe, name: str, run_dir: str, workers: int, tracking: TrackingConfig) -> FinetuneConfig:
    """The run of this recipe, in its place below `run_dir`."""
    values = {field: getattr(recipe, field) for field in RECIPE_FIELDS}
    place = {"run_dir": storage.join(run_dir, name), "workers": workers, "tracking": tracking}
    return FinetuneConfig(**values | place | {"name": name})


def done_of(runs: Sequence[FinetuneRun]) -> dict[str, FinetuneResult]:
    """The results of those that are finished, by name. Raises UserError for what another config put in their place."""
    found = {run.name: finished(run.config.run_dir, run.identity) for run in runs}
    return {name: result for name, result in found.items() if result is not None}


def listed(runs: Sequence[FinetuneRun], done: Mapping[str, FinetuneResult]) -> dict[str, Any]:
    """{dry_run, runs, done}: how many are done, and a row a run with `name`, `system`, `seed`, `done` and `seconds`,
    which are null where it is to come."""
    rows = [
        {"name": run.name, "system": run.config.system, "seed": run.config.seed, "done": run.name in done}
        | {"seconds": done[run.name].seconds if run.name in done else None}
        for run in runs
    ]
    return {"dry_run": True, "runs": rows, "done": sum(row["done"] for row in rows)}


def run_left(
    runs: Sequence[FinetuneRun],
    done: dict[str, FinetuneResult],
    start: Callable[[FinetuneRun], FinetuneResult],
    workers: int,
    say: Callable[[str], None],
) -> None:
    """Adds the results of the runs that are not in `done` to it, one run after the other in one Ray session."""
    todo = [run for run in runs if run.name not in done]
    with session.connected(workers) if todo else contextlib.nullcontext():
        for place, run in enumerate(todo):
            say(f"run {len(done) + 1} of {len(runs)}, {run.name}{_left(todo[place:], done)}")
            done[run.name] = start(run)


def publish(run_dir: str, tracker: Tracker, table: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Puts the table as results.json, after the `files` that show it, into the folder and the tracked run."""
    for name, data in {**files, "results.json": (json.dumps(table, indent=1) + "\n").encode()}.items():
        tracker.artifact(name, data)
        storage.write(storage.join(run_dir, name), data)


@dataclass(frozen=True)
class UtterancePrediction:
    """What a run said of one utterance: the fold that tested it, truth_P and, by condition ("" is clean), guess_P."""

    fold: int
    truth_P: np.ndarray
    guess_P: dict[str, np.ndarray]


def predictions(text: str) -> Iterator[tuple[str, UtterancePrediction]]:
    """The rows of a predictions.csv, by the key of the utterance."""
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


def seconds_of(runs: Sequence[FinetuneRun], done: Mapping[str, FinetuneResult]) -> dict[str, float]:
    """What the runs of each system took together."""
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
