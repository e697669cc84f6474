"""The trials of a sweep from its start to its end: which comes next with which values, and what becomes of each.

What a trial tries comes from sweep_search.py; what becomes of it goes into the tracked runs and into the journal.
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
    """The trials of one sweep: what they draw from, where they are on record and tracked, and which are left or under
    way, by number."""

    config: SweepConfig
    dimensions: Sequence[SearchDimension]
    journal: Journal
    children: TrackedTrials
    left: deque[int] = field(default_factory=deque)
    under_way: set[int] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles what it is given into its own folder, which is thrown away unread.
        return {}

    def begin(self) -> TrialRecord:
        """The record of the next trial, which starts; one that was begun before has the same values."""
        number = self.left.popleft()
        self.under_way.add(number)
        known = self.journal.records.get(number)
        if known is None:
            others = list(self.journal.records.values())
            values = suggest(self.dimensions, self.config.search, self.config.seed, number, others)
            known = TrialRecord(number, values)
            self.journal.write(known)
        return known

    def report(self, number: int, result: Mapping[str, Any]) -> None:
        """One epoch of a trial. One that was started again comes to the same epochs once more."""
        record = self.journal.records[number]
        kept = (METRIC, "epoch", "train_loss", "folds", "seconds")
        report = {name: result[name] for name in kept if name in result}
        record.reports = [*(each for each in record.reports if each["epoch"] < report["epoch"]), report]
        record.error = str(result.get("error", ""))
        self.children.report(record, report)

    def end(self, number: int, status: str, error: str = "") -> None:
        """A trial is over: tracked first, so that one on record is tracked whole."""
        record = self.journal.records[number]
        record.error = error or record.error
        record.status = "failed" if record.error else status
        self.children.end(record)
        self.journal.write(record)
        self.under_way.discard(number)

    def died(self, number: int, why: str) -> None:
        """The process of a trial died or failed: it starts again, as the next one, unless it did too often.

        Tune's own max_failures counts the trial as failed at the first death when its process dies between two trials
        (reuse_actors, Ray 2.60: the same death is reported twice).
        """
        record, most = self.journal.records[number], self.config.max_failures
        if 0 <= most <= record.restarts:
            self.end(number, "failed", f"its process died or failed, past max_failures={most}: {why}")
            return
        record.restarts += 1
        self.journal.write(record)
        self.under_way.discard(number)
        self.left.appendleft(number)
        note(f"sweep: the process of {record.name} died or failed ({why}): it starts again")
