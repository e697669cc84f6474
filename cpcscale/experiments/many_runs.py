"""Several fine-tunings below one tracked run: which are done, what is left, and how long that may take.

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
from cpcscale.emotion.estimate_time import TRIED, estimate_s
from cpcscale.emotion.finetune_result import FinetuneResult
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.experiments.finetune import FinetuneConfig, finished
from cpcscale.experiments.many_runs_config import RECIPE_FIELDS
from cpcscale.progress import duration
from cpcscale.tracking.tracker import Tracker, TrackingConfig


@dataclass(frozen=True)
class FinetuneRun:
    """One fine-tuning: its config, its corpus, and digests of what its result follows from."""

    config: FinetuneConfig
    corpus: Corpus
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


def forecast(
    runs: Sequence[FinetuneRun], done: Mapping[str, FinetuneResult], say: Callable[[str], None]
) -> dict[str, Any]:
    """{dry_run, runs, done, hours, tried}: a row a run with `name`, `system`, `seed`, `done` and `seconds`.

    The seconds of a run that is to come are the mean of the finished ones of its system here; where there is none, they
    come from a trial of a few utterances (estimate.py), which `say` announces, and `tried` names its system. `hours`
    adds up the runs to come.
    """
    rows: list[dict[str, Any]] = []
    tried: dict[str, float] = {}
    for run in runs:
        result, expected, system = done.get(run.name), _expected_s(run, done), run.config.system
        if result is None and expected is None:
            if system not in tried:
                say(f"a trial of {system} on {TRIED} utterances")
                tried[system] = estimate_s(run.config, run.corpus, run.config.workers)
            expected = tried[system]
        seconds = expected if result is None else result.seconds
        row = {"name": run.name, "system": run.config.system, "seed": run.config.seed, "seconds": seconds}
        rows.append(row | {"done": result is not None})
    coming = [row for row in rows if not row["done"]]
    return {
        "dry_run": True,
        "runs": rows,
        "done": len(rows) - len(coming),
        "hours": sum(row["seconds"] for row in coming) / 3600,
        "tried": list(tried),
    }


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


def _expected_s(run: FinetuneRun, done: Mapping[str, FinetuneResult]) -> float | None:
    known = [result.seconds for result in done.values() if result.system == run.config.system]
    return float(np.mean(known)) if known else None


def _left(todo: Sequence[FinetuneRun], done: Mapping[str, FinetuneResult]) -> str:
    seconds = [_expected_s(run, done) for run in todo]
    known = [value for value in seconds if value is not None]
    return f"; about {duration(sum(known))} left" if len(known) == len(seconds) else ""
