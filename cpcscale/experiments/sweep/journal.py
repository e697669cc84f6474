"""What is on record of a sweep that goes on: one JSON file a trial, written when it starts and when it is over.

A sweep that was killed goes on from them: a trial that is over is not run again, one that was under way starts anew
with the same values.

Why not `Tuner.restore` (tried with Ray 2.60 and SIGKILL to the driver): it runs trials again that ended since its last
snapshot, of every 10 s. With a snapshot at each event it writes over the one before in place, so that 2 of 4 kills left
a cut file, which it takes as no experiment, and begins anew. Its ASHA forgets the trials that are over. It unpickles
what it finds, which others may have written where the store is shared; these records are plain JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cpcscale import storage
from cpcscale.errors import UserError

log = logging.getLogger(__name__)

# What is maximised: the mean over folds of the best CCC so far on the fold's development speakers.
METRIC = "inner_ccc"
# What a trial that cannot be trained scores: the least a CCC can be.
WORST = -1.0
# A trial is running, or it is over: trained to its end, stopped by the scheduler, or not to be trained.
STATUSES = ("running", "finished", "stopped", "failed")


@dataclass
class TrialRecord:
    """One trial: what it tries, and how it went. `reports` are those of trials.folds_in_step, one an epoch."""

    number: int
    values: dict[str, Any]
    status: str = "running"
    reports: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 0  # after its process died
    error: str = ""

    @property
    def name(self) -> str:
        """What the tracked run and the folder are called."""
        return f"trial-{self.number:04d}"

    @property
    def is_over(self) -> bool:
        """Whether it is not to be run again."""
        return self.status != "running"

    @property
    def epochs(self) -> int:
        """The epochs it was trained for."""
        return int(self.reports[-1]["epoch"]) if self.reports else 0

    @property
    def score(self) -> float:
        """inner_ccc at its end; WORST for one that failed."""
        score = float(self.reports[-1][METRIC]) if self.reports and self.status != "failed" else WORST
        return score if math.isfinite(score) else WORST

    @property
    def seconds(self) -> float:
        """How long it trained, without the starts that its process did not live through."""
        return float(self.reports[-1]["seconds"]) if self.reports else 0.0


class Journal:
    """The records of the sweep in one run folder (path or s3://)."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.folder = storage.join(run_dir, "trials")
        self.records: dict[int, TrialRecord] = {}
        self._note = storage.join(run_dir, "sweep.json")

    def begun(self) -> dict[str, str] | None:
        """The digests of what an unfinished sweep here follows from; None where there is none."""
        if not storage.exists(self._note):
            return None
        return {str(name): str(value) for name, value in _parsed(self._note).items()}

    def begin(self, identity: Mapping[str, str]) -> None:
        """Says what the sweep follows from, or reads the trials on record where it was begun before."""
        if self.begun() is None:
            storage.remove(self.folder)
            storage.write(self._note, (json.dumps(dict(identity), indent=1) + "\n").encode())
            return
        self.read()

    def read(self) -> None:
        """Reads the trials on record. Raises UserError naming one that is damaged."""
        for name in self._files():
            if name.endswith("/trial.json"):
                record = _record(storage.join(self.folder, name))
                self.records[record.number] = record

    def write(self, record: TrialRecord) -> None:
        """Puts the trial on record as it stands."""
        self.records[record.number] = record
        text = json.dumps(dataclasses.asdict(record)) + "\n"
        storage.write(storage.join(self.place(record), "trial.json"), text.encode())

    def place(self, record: TrialRecord) -> str:
        """The folder of a trial."""
        return storage.join(self.folder, record.name)

    def over(self) -> list[TrialRecord]:
        """The trials that are over, by number."""
        return [record for _, record in sorted(self.records.items()) if record.is_over]

    def clear(self) -> None:
        """Removes all of it: the sweep is finished. What the tracking store has not got yet stays, and is named."""
        if unsent := [name for name in self._files() if name.endswith("unsent.json")]:
            log.warning("%d child runs are not all in the tracking store yet: the same command sends them", len(unsent))
            return
        storage.remove(self.folder)
        storage.remove(self._note)

    def _files(self) -> list[str]:
        with contextlib.suppress(storage.NotFoundError):
            return storage.list_files(self.folder)
        return []


def _record(url: str) -> TrialRecord:
    found = _parsed(url)
    try:
        record = TrialRecord(**found)
    except TypeError:
        record = None
    if record is None or record.status not in STATUSES:
        raise UserError(f"{url} is not the record of a trial: remove it, and that trial is run anew")
    # What was reported before a kill is reported again.
    return record if record.is_over else dataclasses.replace(record, reports=[])


def _parsed(url: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read(url))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{url} is damaged: remove it and start the same command again")
    return found
