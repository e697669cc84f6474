"""Which trial of a sweep starts next and with which values, and what happens when one reports, ends or dies.

suggest.py draws the values of a trial; its results go to the tracked runs and to the journal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpcscale.experiments.sweep.config import SweepConfig
from cpcscale.experiments.sweep.journal import METRIC, Journal, TrialRecord
from cpcscale.experiments.sweep.space import SearchDimension
from cpcscale.experiments.sweep.suggest import suggest
from cpcscale.experiments.sweep.tracked_trials import TrackedTrials
from cpcscale.progress import note


@dataclass(frozen=True)
class TrialSchedule:
    """The trials of one sweep, with the numbers of those that are left to start and of those that run."""

    config: SweepConfig
    dimensions: Sequence[SearchDimension]
    journal: Journal
    tracked: TrackedTrials
    left: deque[int] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its searcher and callbacks into its own folder, which is thrown away unread.
        return {}

    def start_next(self) -> TrialRecord:
        """The record of the trial that starts next; one that was started before keeps its values."""
        number = self.left.popleft()
        self.running.add(number)
        known = self.journal.records.get(number)
        if known is None:
            others = list(self.journal.records.values())
            values = suggest(self.dimensions, self.config.search, self.config.seed, number, others)
            known = TrialRecord(number, values)
            self.journal.write(known)
        return known

    def report(self, number: int, result: Mapping[str, Any]) -> None:
        """Records one epoch of a trial, in place of an earlier report of that epoch if the trial was started again."""
        record = self.journal.records[number]
        kept = (METRIC, "epoch", "train_loss", "folds", "seconds")
        report = {name: result[name] for name in kept if name in result}
        record.reports = [*(each for each in record.reports if each["epoch"] < report["epoch"]), report]
        record.error = str(result.get("error", ""))
        self.tracked.report(record, report)

    def end(self, number: int, status: str, error: str = "") -> None:
        """Records the end of a trial, in its tracked run first: a trial that ended in the journal is tracked whole."""
        record = self.journal.records[number]
        record.error = error or record.error
        record.status = "failed" if record.error else status
        self.tracked.end(record)
        self.journal.write(record)
        self.running.discard(number)

    def process_died(self, number: int, why: str) -> None:
        """Starts a trial again, as the next one, whose process died or failed; ends it as failed past max_failures.

        Tune's own max_failures is not used: with reuse_actors (Ray 2.60) it reports the death of a process between two
        trials twice, so that the trial counts as failed at once.
        """
        record, most = self.journal.records[number], self.config.max_failures
        if 0 <= most <= record.restarts:
            self.end(number, "failed", f"its process died or failed more than max_failures={most} times: {why}")
            return
        record.restarts += 1
        self.journal.write(record)
        self.running.discard(number)
        self.left.appendleft(number)
        note(f"sweep: the process of {record.name} died or failed ({why}): it starts again")
