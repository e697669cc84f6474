"""The pretraining loop: batch, step, log, validate, save. It knows nothing of Ray, MLflow or S3."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cpcscale import audio
from cpcscale.errors import UserError
from cpcscale.model.cpc import build
from cpcscale.shards.index import Index
from cpcscale.stream import window
from cpcscale.stream.feed import BadWindow, Batch, ThreadFeed, WindowReader, decode_threads
from cpcscale.stream.lane import Lanes, served
from cpcscale.stream.plan import Plan
from cpcscale.train import resume
from cpcscale.train.checkpoint import Checkpoints, restore
from cpcscale.train.meter import Meter
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.step import TrainStep, scores
from cpcscale.train.validate import Validation
from cpcscale.train.window_log import WindowLog

log = logging.getLogger(__name__)

# Logged records that a checkpoint carries.
_RECORDS = 64


class Observer(Protocol):
    """Who watches a run; called on rank 0 alone.

    `replayed` gives metrics that a checkpoint carries when a run goes on: the observer may have died without them.
    """

    def note(self, text: str) -> None: ...
    def progress(self, step: int, total: int) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def saved(self) -> None: ...
    def replayed(self, step: int, values: Mapping[str, float]) -> None: ...


class Quiet:
    """The observer of a run that nobody watches."""

    def note(self, text: str) -> None:
        log.debug(text)

    def progress(self, step: int, total: int) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def saved(self) -> None: ...
    def replayed(self, step: int, values: Mapping[str, float]) -> None: ...


@dataclass(frozen=True)
class Data:
    """The shard set to learn from, and the held-out ones by name, such as `heldout` and `unseen`."""

    train: Index
    validation: Mapping[str, Index]


def pretrain(recipe: Recipe, data: Data, run_dir: str, ranks: Ranks, observer: Observer) -> dict[str, Any]:
    """Trains to the recipe's last step, going on from the newest checkpoint in `run_dir` when there is one.

    Returns, on every rank, the summary: steps, loss, accuracy_mean, accuracy_chance, audio_s, audio_s_per_s,
    data_wait_share, checkpoint, skipped_updates, bad_windows, and the scores of each validation set.
    """
    torch.set_num_threads(recipe.train.threads or max(1, (os.cpu_count() or 1) // ranks.on_node))
    run = _Run(recipe, data, run_dir, ranks, observer)
    try:
        while run.position.step < run.total:
            batch = run.fetch()
            run.update(batch)
            run.log(batch)
            run.validate()
            run.save()
        return run.summary()
    finally:
        run.feed.close()


class _Run:
    """One rank's state; each method is a phase of the loop."""

    def __init__(self, recipe: Recipe, data: Data, run_dir: str, ranks: Ranks, observer: Observer) -> None:
        self.recipe, self.index, self.ranks, self.observer = recipe, data.train, ranks, observer
        plan = Plan(window.count(recipe.window, data.train.samples), data.train.bounds, recipe.seed)
        self.lanes = Lanes(plan.total, recipe.train.lanes, recipe.train.batch)
        self.total = recipe.train.steps or max(1, round(recipe.train.epochs * self.lanes.steps_per_epoch))
        self.checkpoints = Checkpoints(run_dir, recipe.checkpoint.keep)
        restored = resume.newest(self.checkpoints, ranks)
        self.position = resume.position(restored, recipe, data.train.fingerprint, self.lanes, self.total)
        offset, gain = data.train.wave_scale()
        model = build(recipe.model, recipe.seed, offset=offset, gain=gain).to(ranks.device)
        self.step = TrainStep(model, recipe, ranks)
        if restored:
            restore(restored, model, self.step.optimizer)
            if self.position.scaler:
                self.step.scaler.load_state_dict(self.position.scaler)
        self.validations = {name: Validation(index, recipe, ranks) for name, index in data.validation.items()}
        path = recipe.train.log_window_ids
        self.window_log = WindowLog(path, data.train, self.lanes, ranks, self.position.step) if path else None
        self.feed = ThreadFeed(
            WindowReader(data.train, recipe.window, recipe.seed),
            plan,
            self.lanes,
            served(recipe.train.lanes, ranks.rank, ranks.world),
            self.position.step,
            threads=decode_threads(recipe.feed.decode_threads, ranks.on_node),
            prefetch=recipe.feed.prefetch,
        )
        self.meter, self.new_bad = Meter(), list[BadWindow]()
        if ranks.first:
            self._announce(data, sum(parameter.numel() for parameter in model.parameters()))
            if restored:
                observer.note(f"going on from {restored.url}: step {self.position.step} of {self.total}")
                for step, values in self.position.records:
                    observer.replayed(step, values)

    def fetch(self) -> Batch:
        with self.meter.phase("wait"):
            return self.feed.next()

    def update(self, batch: Batch) -> None:
        with self.meter.phase("step"):
            self.result = self.step(batch, self.position.step)
        self.position.step += 1
        self.position.metrics = {}
        audio_s = self.result.samples / audio.RATE_HZ
        self.meter.heard(audio_s)
        self.position.audio_s += audio_s
        self.position.skipped += self.result.skipped
        self.position.nonfinite += self.result.nonfinite
        self.position.bad += self.result.bad
        self.new_bad += batch.bad
        self._refuse_past_budgets()

    def log(self, batch: Batch) -> None:
        with self.meter.phase("log"):
            step = self.position.step
            if self.window_log:
                self.window_log.write(step, batch)
            # A checkpoint carries the metrics of its own step.
            if self._due(self.recipe.train.log_every_steps) or self._due(self.recipe.checkpoint.every_steps):
                values = scores(self.result, self.ranks) | self.meter.lap()
                values["audio_hours"] = self.position.audio_s / 3600
                self.position.metrics |= values
                self._record(values)
            if self.ranks.first:
                self.observer.progress(step, self.total)

    def validate(self) -> None:
        if not self.validations or not self._due(self.recipe.train.validate_every_steps):
            return
        with self.meter.phase("validate"):
            by_set = {name: validation(self.step) for name, validation in self.validations.items()}
            values = {f"{name}_{metric}": value for name, scored in by_set.items() for metric, value in scored.items()}
            self.position.metrics |= values
            self._record(values)

    def save(self) -> None:
        if not self._due(self.recipe.checkpoint.every_steps):
            return
        with self.meter.phase("save"):
            for windows in self.ranks.gathered(self.new_bad):
                self.position.bad_windows += [{"key": self._key(bad), **vars(bad)} for bad in windows]
            self.new_bad = []
            self.position.cursors = self.lanes.cursors(self.position.step)
            self.position.scaler = self.step.scaler.state_dict()
            if self.ranks.first:
                self.checkpoints.save(self.step.model, self.step.optimizer, self.position)
                self.observer.saved()

    def summary(self) -> dict[str, Any]:
        if any(f"{name}_loss" not in self.position.metrics for name in self.validations):
            # This checkpoint was not the last of the run that made it.
            self.validate()
        metrics = self.position.metrics
        # A run that was finished already has no rates of its own; its last ones stand in the checkpoint.
        rates = self.meter.total() if self.meter.heard_s else metrics
        return {
            "steps": self.position.step,
            "loss": metrics["loss"],
            "accuracy_mean": metrics["accuracy_mean"],
            "accuracy_chance": self.recipe.objective.chance,
            "audio_s": self.position.audio_s,
            "audio_s_per_s": rates["audio_s_per_s"],
            "data_wait_share": rates["data_wait_share"],
            "checkpoint": self.checkpoints.at(self.position.step),
            "skipped_updates": self.position.skipped,
            "bad_windows": self.position.bad,
            **{name: _grouped(metrics, f"{name}_") for name in self.validations},
        }

    def _record(self, values: Mapping[str, float]) -> None:
        self.position.records = [*self.position.records, [self.position.step, dict(values)]][-_RECORDS:]
        if self.ranks.first:
            self.observer.metrics(self.position.step, values)

    def _due(self, every: int) -> bool:
        return self.position.step % every == 0 or self.position.step == self.total

    def _key(self, bad: BadWindow) -> str:
        return str(self.index.utterances["key"][bad.utterance])

    def _refuse_past_budgets(self) -> None:
        """Both counts are of all ranks, so all stop at the same step."""
        train, position = self.recipe.train, self.position
        if position.nonfinite > train.nonfinite_budget:
            raise UserError(
                f"{position.nonfinite} updates had a loss or gradient that is not finite, past train.nonfinite_budget="
                f"{train.nonfinite_budget}: lower optim.learning_rate, set optim.clip_norm, or use train.precision=fp32"
            )
        # Of an epoch at least: the first bad window among few is not yet a share.
        seen = max(position.step * train.batch, self.lanes.windows)
        if position.bad > self.recipe.feed.bad_budget * seen:
            example = f"; one is in {self._key(self.new_bad[-1])} ({self.new_bad[-1].cause})" if self.new_bad else ""
            raise UserError(
                f"{position.bad} windows do not decode, past feed.bad_budget={self.recipe.feed.bad_budget} of {seen}"
                f"{example}: pack the audio again without them, or raise the budget"
            )

    def _announce(self, data: Data, parameters: int) -> None:
        train = self.recipe.train
        self.observer.note(
            f"{parameters:,} parameters; {data.train.duration_s / 3600:.2f} h in {self.lanes.windows:,} windows of "
            f"{self.recipe.window.seconds:g} s, {self.lanes.steps_per_epoch:,} steps an epoch at batch {train.batch}; "
            f"{self.total:,} steps, {self.ranks.world} worker(s), {train.precision} on {self.ranks.device.type}"
        )


def _grouped(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
