"""The tracked runs of a sweep's trials, as child runs of the sweep, and of the folds of its best trial.

Only the driver writes them, so that one process writes to the store. After a kill, the next driver finds the existing
runs by the run.json in a trial's folder, or by their parent and name, so that no run exists twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cpcscale import storage
from cpcscale.experiments.sweep.journal import METRIC, WORST, Journal, TrialRecord
from cpcscale.progress import Progress
from cpcscale.tracking import run_note
from cpcscale.tracking.about import About
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.store import StoreError, TrackingConfig
from cpcscale.tracking.tracker import Tracker

log = logging.getLogger(__name__)

_RUN_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


class Sweep(Protocol):
    """The sweep that trials are of."""

    @property
    def name(self) -> str: ...

    def tags(self, values: Mapping[str, Any] | None = None) -> dict[str, str]:
        """The tags of the trial with these values."""

    def about(self, title: str, what: str) -> About:
        """What MLflow's pages show of a part of it."""


class TrackedTrials:
    """The tracked runs of the `trials` of one sweep."""

    def __init__(
        self,
        tracking: TrackingConfig,
        parent: str,
        journal: Journal,
        sweep: Sweep,
        trials: int,
        allowed: Callable[[], bool],
    ) -> None:
        self._tracking, self._parent, self._journal, self._sweep = tracking, parent, journal, sweep
        self._allowed = allowed
        self._open: dict[int, Tracker] = {}
        # The runs of an earlier driver, by parent and name.
        self._known: dict[tuple[str | None, str], TrackedRun] = {}
        self._progress = Progress("sweep", trials, "trials")

    def adopt_existing(self) -> None:
        """Finds the runs that an earlier driver made, and completes those of trials that ended."""
        with contextlib.suppress(StoreError):
            runs = read_runs(self._tracking, children=True)
            self._known = {(run.parent, run.name): run for run in runs if run.kind in ("trial", "fold")}
        for record in self._journal.ended():
            run = self._known.get((self._parent, record.name))
            if run is None or run.status != _RUN_STATUS[record.status]:
                self.start(record)
                for report in record.reports:
                    self.report(record, report)
                self._finish(record)
        self._show_progress()

    def start(self, record: TrialRecord) -> None:
        """Opens the run of a trial that starts, unless it is open because the trial starts again."""
        if record.number in self._open:
            return
        tags = self._sweep.tags(record.values) | {"cpcscale.trial": str(record.number)}
        folder = self._journal.trial_folder(record)
        about = self._sweep.about(f"{record.name} of {self._sweep.name}", f"Trial of {record.values}")
        if tracker := self._start_run("trial", record.name, folder, self._parent, tags, record.values, about):
            self._open[record.number] = tracker

    def report(self, record: TrialRecord, report: Mapping[str, Any]) -> None:
        """Logs one epoch of a trial."""
        if record.number in self._open:
            values = {key: report[key] for key in (METRIC, "train_loss") if key in report}
            self._open[record.number].log(int(report["epoch"]), values)

    def end(self, record: TrialRecord) -> None:
        """Closes the run of a trial that ended."""
        self._finish(record)
        self._show_progress()

    def add_folds(self, record: TrialRecord) -> None:
        """Adds a child run for each fold of a trial, with the curve of its development CCC."""
        if (parent := self._run_id(record)) is None:
            return
        for fold in range(len(record.reports[-1]["folds"])):
            folder = storage.join(self._journal.trial_folder(record), f"fold-{fold}")
            tags = self._sweep.tags(record.values) | {"cpcscale.fold": str(fold)}
            title = f"fold-{fold} of {record.name} of {self._sweep.name}"
            about = self._sweep.about(title, f"Fold {fold} of the best trial")
            tracker = self._start_run("fold", f"fold-{fold}", folder, parent, tags, {"fold": fold}, about)
            if tracker is None:
                continue
            for report in record.reports:
                epoch = report["folds"][fold]
                # A fold whose patience ended repeats its last epoch while the other folds go on.
                tracker.log(int(epoch["epoch"]), {name: epoch[name] for name in ("train_loss", "dev_ccc")})
            tracker.finish("FINISHED", {"best_dev_ccc": record.reports[-1]["folds"][fold]["best_dev_ccc"]})

    def close(self) -> None:
        """Closes the runs of trials that are still running; they continue when the sweep does."""
        for number in list(self._open):
            self._open.pop(number).finish("KILLED")
        self._progress.close()

    def _finish(self, record: TrialRecord) -> None:
        if tracker := self._open.pop(record.number, None):
            came = record.error or f"{METRIC} {record.score:.3f}"
            tracker.outcome(f"{record.status.capitalize()} after {record.epochs} epochs: {came}")
            tracker.finish(_RUN_STATUS[record.status], {"restarts": record.restarts} if record.restarts else {})

    def _start_run(
        self,
        kind: str,
        name: str,
        folder: str,
        parent: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        about: About,
    ) -> Tracker | None:
        run_file = storage.join(folder, run_note.NAME)
        known = self._known.get((parent, name))
        # An earlier driver was killed after it created the run and before it wrote run.json.
        if known is not None and not storage.exists(run_file):
            storage.write(run_file, json.dumps({"run_id": known.run_id, "kind": kind}).encode())
        try:
            return Tracker.start(
                self._tracking,
                kind=kind,
                name=name,
                run_dir=folder,
                tags=tags,
                params=params,
                parent=parent,
                allowed=self._allowed,
                about=about,
            )
        except StoreError as error:
            log.warning("%s is not tracked: %s", name, error)
            return None

    def _run_id(self, record: TrialRecord) -> str | None:
        return run_note.read(self._journal.trial_folder(record)).get("run_id")

    def _show_progress(self) -> None:
        ended = self._journal.ended()
        best = max((record.score for record in ended), default=WORST)
        self._progress.update(len(ended), f"best {METRIC} {best:.3f}")
