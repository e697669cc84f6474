"""The pretraining loop: batch, step, log, validate, save. It does not depend on Ray, MLflow or S3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cpcscale import audio
from cpcscale.machine import usable_cores
from cpcscale.stream.batch import BadWindow, Batch
from cpcscale.stream.feed import Feed, FeedSource, ThreadFeed, decode_threads
from cpcscale.stream.lanes import lanes_of_rank
from cpcscale.train import error_budgets
from cpcscale.train.checkpoint import collect_tensors
from cpcscale.train.log_metrics import feed_seconds, log_metrics, summary
from cpcscale.train.observer import Observer, RunRequests, StoppedError, asks_to_stop
from cpcscale.train.optim import learning_rate
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.scores import reduce_scores
from cpcscale.train.setup import Data, StepMaker, set_up
from cpcscale.train.step import TrainStep
from cpcscale.train.time_account import HiddenSeconds, TimeAccount
from cpcscale.train.validate import Validation

# How many of the newest logged records a checkpoint holds.
_RECORDS = 64

# Makes the feed of a rank from a step on; the batches do not depend on the kind of feed.
FeedMaker = Callable[[FeedSource, Ranks, int], Feed]


def thread_feed(source: FeedSource, ranks: Ranks, start: int) -> Feed:
    """The feed that decodes in threads of the rank's own process."""
    lanes = lanes_of_rank(source.order.lanes.lanes, ranks.rank, ranks.world)
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
    requests: RunRequests | None = None,
    make_step: StepMaker = TrainStep,
) -> dict[str, Any]:
    """Trains to the recipe's last step, from the newest checkpoint in `run_dir` if there is one.

    Returns `log_metrics.summary` on every rank. `holder` is the id of the Lease under which the run is made; without
    one the run is taken from whoever holds it. If another process takes the run over, the next checkpoint is not
    published and OvertakenError is raised on every rank. Through `requests` another thread of rank 0 can ask for a
    checkpoint after the current step, or for a checkpoint and then to stop, which raises StoppedError on every rank.
    `make_step` makes the object whose calls are the updates.
    """
    torch.set_num_threads(recipe.train.threads or max(1, usable_cores() // ranks.on_node))
    run = _Run(recipe, data, run_dir, ranks, observer, make_feed, holder, requests or RunRequests(), make_step)
    try:
        while run.position.step < run.total and not run.stopping:
            batch = run.fetch()
            run.update(batch)
            run.log(batch)
            run.validate()
            run.save()
        return run.finish()
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
        requests: RunRequests,
        make_step: StepMaker,
    ) -> None:
        self.recipe, self.ranks, self.observer, self.requests = recipe, ranks, observer, requests
        self.setup = set_up(recipe, data, run_dir, ranks, observer, holder, make_step)
        self.position, self.order, self.total = self.setup.position, self.setup.order, self.setup.total
        self.step, self.saver = self.setup.step, self.setup.saver
        self.validations = {name: Validation(index, recipe, ranks) for name, index in data.validation.items()}
        source = FeedSource(data.train, self.order, recipe.window, recipe.feed, recipe.measures)
        self.feed = make_feed(source, ranks, self.position.step)
        self.meter, self.new_bad = TimeAccount(self.step.timeline), list[BadWindow]()
        # Whether the run was asked to stop after this step.
        self.stopping = False

    def fetch(self) -> Batch:
        with self.meter.phase("wait"):
            return self.feed.next()

    def update(self, batch: Batch) -> None:
        scored = self._logged(self.position.step + 1)
        self.result = self.step(batch, self.position.step, scored=scored, request=self.requests.number)
        self.position.step += 1
        self.position.metrics = {}
        audio_s = self.result.samples / audio.RATE_HZ
        self.meter.count_audio(audio_s)
        self.position.audio_s += audio_s
        self.position.skipped += self.result.empty
        self.position.bad += self.result.bad
        self.new_bad += batch.bad
        if self.result.scored:
            # Read on scored steps, which wait for a GPU anyway: other steps must not wait.
            skipped, nonfinite = self.step.faults()
            self.position.skipped += skipped
            self.position.nonfinite += nonfinite
        self._check_budgets()

    def log(self, batch: Batch) -> None:
        with self.meter.phase("logging"):
            step = self.position.step
            if self.setup.window_log:
                self.setup.window_log.write(step, batch)
            # Steps with a checkpoint are scored too, so that it holds the metrics of its own step.
            if self.result.scored:
                lap, flops = self.meter.lap(self._hidden(), "logging"), self.setup.costs.flops_per_s.total
                values = reduce_scores(self.result.parts, self.ranks)
                values |= log_metrics(lap, self.feed.traffic(), flops, self.recipe.train.precision, self.ranks)
                values["audio_hours"] = self.position.audio_s / 3600
                values["learning_rate"] = learning_rate(self.recipe.optim, step - 1, self.total)
                self.position.metrics |= values
                self._record(values)
            if self.ranks.first:
                self.observer.progress(step, self.total)

    def validate(self) -> None:
        if not self.validations or not self._due(self.recipe.train.validate_every_steps):
            return
        with self.meter.phase("validation"):
            by_set = {name: validation(self.step) for name, validation in self.validations.items()}
            values = {f"{name}_{metric}": value for name, scored in by_set.items() for metric, value in scored.items()}
            self.position.metrics |= values
            self._record(values)

    def save(self) -> None:
        self._notify_saved()
        self.stopping = asks_to_stop(self.result.request)
        if not (self.result.asked or self._due(self.recipe.checkpoint.every_steps)):
            return
        with self.meter.phase("checkpoint"):
            known = len(self.position.bad_windows)
            self._gather_bad()
            self.position.cursors = self.order.cursors(self.position.step)
            self.position.scaler = self.step.scaler.state_dict()
            self._wait_for_save()
            if self.saver:
                tensors = collect_tensors(self.step.contrast, self.step.optimizer, self.step.ema)
                self.saver.save(tensors, self.position)
                if len(self.position.bad_windows) > known:
                    self.observer.quarantined(self.position.bad_windows)

    def finish(self) -> dict[str, Any]:
        """The summary, once the last checkpoint is published."""
        self._wait_for_save()
        self.meter.lap(self._hidden(), "checkpoint")
        if self.position.step < self.total:
            raise StoppedError(f"stopped after step {self.position.step:,} of {self.total:,}, with a checkpoint of it")
        if any(f"{name}_loss" not in self.position.metrics for name in self.validations):
            # The run that made this checkpoint had more steps, and did not validate at this one.
            self.validate()
        checkpoint = self.ranks.broadcast(self.saver.url if self.saver else None) or self.setup.url
        chance = self.recipe.objective.chance
        return summary(self.position, self.meter.total, chance, checkpoint, list(self.validations))

    def close(self) -> None:
        self.feed.close()
        if self.saver:
            self.saver.close()
            self._notify_saved()

    def _wait_for_save(self) -> None:
        """Waits for the save in progress; raises its error on every rank."""
        self.ranks.raise_on_all(self.saver.wait() if self.saver else None)
        self._notify_saved()

    def _notify_saved(self) -> None:
        if self.saver and self.saver.published():
            self.observer.saved()

    def _hidden(self) -> HiddenSeconds:
        store_s, decode_s = feed_seconds(self.feed.seconds())
        saved_s = self.saver.busy_s if self.saver else 0.0
        return HiddenSeconds(store_s, decode_s, saved_s, *self.step.exchange_s())

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
        """Adds the bad windows of all ranks since the last call to the position."""
        known = {(bad["utterance"], bad["number"]) for bad in self.position.bad_windows}
        for windows in self.ranks.gather(self.new_bad):
            for bad in windows:
                # Only once, though later epochs meet the window again.
                if (bad.utterance, bad.number) not in known:
                    known.add((bad.utterance, bad.number))
                    self.position.bad_windows.append(dict(vars(bad)))
        self.new_bad = []

    def _check_budgets(self) -> None:
        """Raises UserError past an error budget; counts are global, so all ranks stop at the same step."""
        error_budgets.check_finite(self.position, self.recipe)
        # Compared with at least an epoch: one bad window among the first few is not a share yet.
        seen = max(self.position.step * self.recipe.train.batch, self.order.lanes.windows)
        if error_budgets.exceeds_bad_budget(self.position, self.recipe, seen):
            self._gather_bad()
            if self.ranks.first:
                self.observer.quarantined(self.position.bad_windows)
            raise error_budgets.bad_windows_error(self.position, self.recipe, seen)
