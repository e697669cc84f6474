"""The pretraining loop: batch, step, log, validate, save. It knows nothing of Ray, MLflow or S3."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cpcscale import audio
from cpcscale.errors import UserError
from cpcscale.model.cpc import build
from cpcscale.model.size import facts
from cpcscale.shards.index import Index
from cpcscale.stream.counts import shard_windows
from cpcscale.stream.draft import BadWindow, Batch
from cpcscale.stream.feed import Feed, FeedSource, ThreadFeed, decode_threads
from cpcscale.stream.lane import served
from cpcscale.train import budgets, resume
from cpcscale.train.checkpoint import Restored, restore, tensors_of
from cpcscale.train.ledger import Ledger, State
from cpcscale.train.meter import Meter
from cpcscale.train.notices import Notices, StoppedError, asks_to_stop
from cpcscale.train.observer import Observer
from cpcscale.train.publisher import Publisher
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.saver import Saver
from cpcscale.train.step import TrainStep, scores
from cpcscale.train.validate import Validation
from cpcscale.train.window_log import WindowLog

# Logged records that a checkpoint carries.
_RECORDS = 64


@dataclass(frozen=True)
class Data:
    """The shard set to learn from, and the held-out ones by name, such as `heldout` and `unseen`.

    `append`: shards that a newer version of the set has come in at the next edge of an epoch.
    """

    train: Index
    validation: Mapping[str, Index]
    append: bool = False


# The feed of a rank from a step on; what it hands over is the same whoever makes it.
FeedMaker = Callable[[FeedSource, Ranks, int], Feed]


def thread_feed(source: FeedSource, ranks: Ranks, start: int) -> Feed:
    """The feed that decodes in the rank."""
    lanes = served(source.order.lanes.lanes, ranks.rank, ranks.world)
    threads = decode_threads(source.config.decode_threads, ranks.on_node)
    return ThreadFeed(source, lanes, start, threads=threads, lanes_on_node=len(lanes) * ranks.on_node)


def pretrain(
    recipe: Recipe,
    data: Data,
    run_dir: str,
    ranks: Ranks,
    observer: Observer,
    make_feed: FeedMaker = thread_feed,
    holder: str = "",
    notices: Notices | None = None,
) -> dict[str, Any]:
    """Trains to the recipe's last step, going on from the newest checkpoint in `run_dir` when there is one.

    `holder` is the id of the Lease in whose name this is done; without one the run is taken from whoever has it. A
    process that is overtaken raises OvertakenError at its next checkpoint, on every rank, which it does not publish.
    `notices` are what rank 0 is asked meanwhile: a checkpoint after the step under way, or one and then to stop, which
    raises StoppedError on every rank.

    Returns, on every rank, the summary: steps, loss, accuracy_mean, accuracy_chance, audio_s, audio_s_per_s,
    data_wait_share, checkpoint, skipped_updates, bad_windows, and the scores of each validation set.
    """
    torch.set_num_threads(recipe.train.threads or max(1, (os.cpu_count() or 1) // ranks.on_node))
    run = _Run(recipe, data, run_dir, ranks, observer, make_feed, holder, notices or Notices())
    try:
        while run.position.step < run.total and not run.stopping:
            batch = run.fetch()
            run.update(batch)
            run.log(batch)
            run.validate()
            run.save()
        run.finish()
        return run.summary()
    finally:
        run.close()


class _Run:
    """One rank's state; each method is a phase of the loop."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        run_dir: str,
        ranks: Ranks,
        observer: Observer,
        make_feed: FeedMaker,
        holder: str,
        notices: Notices,
    ) -> None:
        self.recipe, self.ranks, self.observer, self.notices = recipe, ranks, observer, notices
        # The last notice that was acted upon, on all ranks.
        self.noticed = 0
        windows = shard_windows(data.train, recipe.window, recipe.feed.cache.path)
        ledger = Ledger(run_dir)
        seen = ledger.head() if ranks.first else State()
        restored = resume.newest(ledger, seen, ranks)
        self.position = resume.position(restored, recipe, data.train, windows, data.append)
        self.begun_at = restored.url if restored else None
        self.order = resume.order_of(self.position, recipe, windows)
        self.total = resume.total_steps(recipe, self.order)
        offset, gain = data.train.wave_scale()
        model = build(recipe.model, recipe.seed, offset=offset, gain=gain)
        begun = resume.origin(restored, recipe)
        if begun:
            resume.begin(model, begun[0])
        model.to(ranks.device)
        self.step = TrainStep(model, recipe, ranks, self.total)
        if restored:
            restore(restored, self.step.contrast, self.step.optimizer, self.step.ema)
            if self.position.scaler:
                self.step.scaler.load_state_dict(self.position.scaler)
        self.validations = {name: Validation(index, recipe, ranks) for name, index in data.validation.items()}
        path = recipe.train.log_window_ids
        self.window_log = WindowLog(path, data.train, self.order.lanes, ranks, self.position.step) if path else None
        self.saver = self._begin(ledger, seen, restored, holder)
        source = FeedSource(data.train, self.order, recipe.window, recipe.feed)
        self.feed = make_feed(source, ranks, self.position.step)
        self.meter, self.new_bad = Meter(), list[BadWindow]()
        if ranks.first:
            self._announce(data)
            if restored:
                observer.note(f"going on from {restored.url}: step {self.position.step} of {self.total}")
                for step, values in self.position.records:
                    observer.replayed(step, values)

    def fetch(self) -> Batch:
        with self.meter.phase("wait"):
            return self.feed.next()

    def update(self, batch: Batch) -> None:
        with self.meter.phase("step"):
            scored = self._logged(self.position.step + 1)
            self.result = self.step(batch, self.position.step, scored=scored, notice=self.notices.number)
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
            if self._logged(step):
                values = scores(self.result, self.ranks) | self.meter.lap()
                values["audio_hours"] = self.position.audio_s / 3600
                values |= self._traffic()
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
        self._tell_saved()
        asked, self.noticed = self.result.notice != self.noticed, self.result.notice
        if not (asked or self._due(self.recipe.checkpoint.every_steps)):
            return
        with self.meter.phase("save"):
            known = len(self.position.bad_windows)
            self._gather_bad()
            self.position.cursors = self.order.cursors(self.position.step)
            self.position.scaler = self.step.scaler.state_dict()
            self._settle()
            if self.saver:
                tensors = tensors_of(self.step.contrast, self.step.optimizer, self.step.ema)
                self.saver.save(tensors, self.position)
                if len(self.position.bad_windows) > known:
                    self.observer.quarantined(self.position.bad_windows)

    @property
    def stopping(self) -> bool:
        """Whether this step is to be the last."""
        return asks_to_stop(self.noticed)

    def finish(self) -> None:
        with self.meter.phase("save"):
            self._settle()
        if self.position.step < self.total:
            raise StoppedError(f"stopped after step {self.position.step:,} of {self.total:,}, with a checkpoint of it")

    def close(self) -> None:
        self.feed.close()
        if self.saver:
            self.saver.close()
            self._tell_saved()

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
            "checkpoint": self.ranks.chosen(self.saver.url if self.saver else None) or self.begun_at,
            "skipped_updates": self.position.skipped,
            "bad_windows": self.position.bad,
            **{name: _grouped(metrics, f"{name}_") for name in self.validations},
        }

    def _begin(self, ledger: Ledger, seen: State, restored: Restored | None, holder: str) -> Saver | None:
        """What saves, on rank 0 of a run that has steps to make."""
        saver, error = None, None
        if self.ranks.first and self.position.step < self.total:
            try:
                step, keep = restored.position.step if restored else 0, self.recipe.checkpoint.keep
                saver = Saver(Publisher(ledger, seen, step, keep=keep, holder=holder), self.recipe)
            except UserError as failure:
                error = failure
        self.ranks.agreed(error)
        return saver

    def _settle(self) -> None:
        """The save under way is done when this returns; what went wrong with it is raised on every rank."""
        self.ranks.agreed(self.saver.settle() if self.saver else None)
        self._tell_saved()

    def _tell_saved(self) -> None:
        if self.saver and self.saver.published():
            self.observer.saved()

    def _traffic(self) -> dict[str, float]:
        """What all ranks and their feeders moved to and from object stores since this start; nothing when none did."""
        moved = self.feed.traffic()
        numbers = [moved.bytes_read, moved.bytes_written, moved.requests, moved.retries]
        totals = self.ranks.sum(torch.tensor(numbers, dtype=torch.float64, device=self.ranks.device)).tolist()
        read, written, requests, retries = totals
        if not requests:
            return {}
        traffic = {"store_read_mb": read / 1e6, "store_written_mb": written / 1e6}
        return {**traffic, "store_requests": requests, "store_retries": retries}

    def _record(self, values: Mapping[str, float]) -> None:
        self.position.records = [*self.position.records, [self.position.step, dict(values)]][-_RECORDS:]
        if self.ranks.first:
            self.observer.metrics(self.position.step, values)

    def _logged(self, step: int) -> bool:
        return any(
            self._due(every, step) for every in (self.recipe.train.log_every_steps, self.recipe.checkpoint.every_steps)
        )

    def _due(self, every: int, step: int | None = None) -> bool:
        step = self.position.step if step is None else step
        return step % every == 0 or step == self.total

    def _gather_bad(self) -> None:
        """The bad windows of all ranks since the last time, into the position."""
        known = {(bad["utterance"], bad["number"]) for bad in self.position.bad_windows}
        for windows in self.ranks.gathered(self.new_bad):
            for bad in windows:
                # Once, though an epoch meets it again.
                if (bad.utterance, bad.number) not in known:
                    known.add((bad.utterance, bad.number))
                    self.position.bad_windows.append(dict(vars(bad)))
        self.new_bad = []

    def _refuse_past_budgets(self) -> None:
        """All counts are of all ranks, so all stop at the same step."""
        budgets.check_finite(self.position, self.recipe)
        # Of an epoch at least: the first bad window among few is not yet a share.
        seen = max(self.position.step * self.recipe.train.batch, self.order.lanes.windows)
        if budgets.too_many_bad(self.position, self.recipe, seen):
            self._gather_bad()
            if self.ranks.first:
                self.observer.quarantined(self.position.bad_windows)
            raise budgets.bad_error(self.position, self.recipe, seen)

    def _announce(self, data: Data) -> None:
        train, lanes = self.recipe.train, self.order.lanes
        share = -(-train.batch // self.ranks.world)
        rows = min(train.micro_batch or share, share)
        costs = facts(self.recipe.model, self.recipe.window.samples, rows)
        weights, hours = costs.parameters, data.train.duration_s / 3600
        self.observer.note(
            f"{weights.total:,} parameters; {hours:.2f} h in {lanes.windows:,} windows of "
            f"{self.recipe.window.seconds:g} s, {lanes.steps_per_epoch:,} steps an epoch at batch {train.batch}; "
            f"{self.total:,} steps, {self.ranks.world} worker(s), {train.precision} on {self.ranks.device.type}"
        )
        self.observer.note(
            f"{weights.kept:,} parameters kept at inference; {costs.frames_per_s:g} frames a second that hear "
            f"{costs.receptive_ms:.1f} ms each; {costs.flops_per_s.total / 1e9:.3g} GFLOP forward for a second of "
            f"audio, 3 times that to train; about {costs.memory_mib:,.0f} MiB in fp32 for {rows} windows at once"
        )


def _grouped(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
