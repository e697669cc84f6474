"""The trials of a sweep as child runs of it, and the folds of the best as child runs of that trial.

They are written by the driver alone: one process touches the store. A driver that goes on after a kill finds the runs
of the one before by the note in a trial's folder, or by their parent and name, so that none is there twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from cpcscale import storage
from cpcscale.experiments.sweep.journal import METRIC, WORST, Journal, TrialRecord
from cpcscale.progress import Progress
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.tracker import StoreError, Tracker, TrackingConfig

log = logging.getLogger(__name__)

_ENDS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


class TrackedTrials:
    """The child runs of one sweep, `trials` in all. `tags` gives those of a trial from its values."""

    def __init__(
        self,
        tracking: TrackingConfig,
        parent: str,
        journal: Journal,
        tags: Callable[[Mapping[str, Any]], dict[str, str]],
        trials: int,
        allowed: Callable[[], bool],
    ) -> None:
        self._tracking, self._parent, self._journal, self._tags = tracking, parent, journal, tags
        self._allowed = allowed
        self._open: dict[int, Tracker] = {}
        # By parent and name; asked of the store when there was a driver before.
        self._known: dict[tuple[str | None, str], TrackedRun] = {}
        self._progress = Progress("sweep", trials, "trials")

    def take_up(self) -> None:
        """Finds the runs that a driver before this one made, and closes those of trials that are over."""
        with contextlib.suppress(StoreError):
            runs = read_runs(self._tracking, children=True)
            self._known = {(run.parent, run.name): run for run in runs if run.kind in ("trial", "fold")}
        for record in self._journal.over():
            run = self._known.get((self._parent, record.name))
            if run is None or run.status != _ENDS[record.status]:
                self.start(record)
                for report in record.reports:
                    self.report(record, report)
                self._finish(record)
        self._say()

    def start(self, record: TrialRecord) -> None:
        """Opens the run of a trial that starts; one that starts again has it open."""
        if record.number in self._open:
            return
        tags = self._tags(record.values) | {"cpcscale.trial": str(record.number)}
        place = self._journal.place(record)
        if tracker := self._started("trial", record.name, place, self._parent, tags, record.values):
            self._open[record.number] = tracker

    def report(self, record: TrialRecord, report: Mapping[str, Any]) -> None:
        """Logs one epoch of a trial."""
        if record.number in self._open:
            values = {key: report[key] for key in (METRIC, "train_loss") if key in report}
            self._open[record.number].log(int(report["epoch"]), values)

    def end(self, record: TrialRecord) -> None:
        """Closes the run of a trial that is over."""
        self._finish(record)
        self._say()

    def folds(self, record: TrialRecord) -> None:
        """Adds the folds of a trial below its run: the curves of their development speakers."""
        if (parent := self._run_id(record)) is None:
            return
        for fold in range(len(record.reports[-1]["folds"])):
            place = storage.join(self._journal.place(record), f"fold-{fold}")
            tags = self._tags(record.values) | {"cpcscale.fold": str(fold)}
            tracker = self._started("fold", f"fold-{fold}", place, parent, tags, {"fold": fold})
            if tracker is None:
                continue
            for report in record.reports:
                epoch = report["folds"][fold]
                # A fold whose patience has ended stands still while the others go on.
                tracker.log(int(epoch["epoch"]), {name: epoch[name] for name in ("train_loss", "dev_ccc")})
            tracker.finish("FINISHED", {"best_dev_ccc": record.reports[-1]["folds"][fold]["best_dev_ccc"]})

    def close(self) -> None:
        """Closes the runs of trials that are under way, which go on with the sweep."""
        for number in list(self._open):
            self._open.pop(number).finish("KILLED")
        self._progress.close()

    def _finish(self, record: TrialRecord) -> None:
        if tracker := self._open.pop(record.number, None):
            tracker.finish(_ENDS[record.status], {"restarts": record.restarts} if record.restarts else {})

    def _started(
        self, kind: str, name: str, place: str, parent: str, tags: Mapping[str, str], params: Mapping[str, Any]
    ) -> Tracker | None:
        note = storage.join(place, "run.json")
        known = self._known.get((parent, name))
        # A driver that was killed between making the run and noting it.
        if known is not None and not storage.exists(note):
            storage.write(note, json.dumps({"run_id": known.run_id, "kind": kind}).encode())
        try:
            return Tracker.start(
                self._tracking,
                kind=kind,
                name=name,
                run_dir=place,
                tags=tags,
                params=params,
                parent=parent,
                allowed=self._allowed,
            )
        except StoreError as error:
            log.warning("%s is not tracked: %s", name, error)
            return None

    def _run_id(self, record: TrialRecord) -> str | None:
        with contextlib.suppress(storage.NotFoundError, ValueError, KeyError):
            return str(json.loads(storage.read(storage.join(self._journal.place(record), "run.json")))["run_id"])
        return None

    def _say(self) -> None:
        over = self._journal.over()
        best = max((record.score for record in over), default=WORST)
        self._progress.at(len(over), f"best {METRIC} {best:.3f}")
