"""The records of an unfinished sweep: one JSON file a trial, written when it starts and when it ends.

After a kill the sweep continues from them: trials that ended are not run again; one that was running starts again with
the same values.

Why not `Tuner.restore` (tried with Ray 2.60 and SIGKILL to the driver): it runs trials again that ended after its last
snapshot (one every 10 s). With a snapshot at each event it overwrites the one before in place: 2 of 4 kills left a
truncated file, which it takes for no experiment and starts over. Its ASHA forgets the trials that ended. It unpickles
what it finds, which others may have written if the store is shared; these records are plain JSON.
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

from cpcscale import config, storage
from cpcscale.errors import UserError

log = logging.getLogger(__name__)

# The figure that is maximised: the mean over folds of the best CCC so far on the fold's development speakers.
METRIC = "inner_ccc"
# The score of a trial that cannot be trained: the lowest possible CCC.
WORST = -1.0
# finished: trained to its end; stopped: by the scheduler; failed: it cannot be trained, or its process kept dying.
STATUSES = ("running", "finished", "stopped", "failed")


@dataclass
class TrialRecord:
    """One trial: its values by config key and its results, a report of `train_folds_by_epoch` for each epoch."""

    number: int
    values: dict[str, Any]
    status: str = "running"
    reports: list[dict[str, Any]] = field(default_factory=list)
    # How often it was started again because its process died.
    restarts: int = 0
    error: str = ""

    @property
    def name(self) -> str:
        """The name of its tracked run and of its folder."""
        return f"trial-{self.number:04d}"

    @property
    def is_over(self) -> bool:
        """Whether it ended, and so is not run again."""
        return self.status != "running"

    @property
    def epochs(self) -> int:
        """The epochs it was trained for."""
        return int(self.reports[-1]["epoch"]) if self.reports else 0

    @property
    def score(self) -> float:
        """Its last inner_ccc; WORST if it failed."""
        score = float(self.reports[-1][METRIC]) if self.reports and self.status != "failed" else WORST
        return score if math.isfinite(score) else WORST

    @property
    def seconds(self) -> float:
        """The seconds that it trained; attempts that died with their process do not count."""
        return float(self.reports[-1]["seconds"]) if self.reports else 0.0


class Journal:
    """The trial records of the sweep in one run folder (path or s3://)."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.folder = storage.join(run_dir, "trials")
        self.records: dict[int, TrialRecord] = {}
        self._identity_file = storage.join(run_dir, "sweep.json")

    def identity(self) -> dict[str, str] | None:
        """The digests that identify the unfinished sweep in this folder; None if there is none."""
        if not storage.exists(self._identity_file):
            return None
        return {str(name): str(value) for name, value in _parsed(self._identity_file).items()}

    def open(self, identity: Mapping[str, str]) -> None:
        """Starts the records of a sweep with this identity, or reads those of the unfinished one."""
        if self.identity() is None:
            storage.remove(self.folder)
            storage.write(self._identity_file, (json.dumps(dict(identity), indent=1) + "\n").encode())
            return
        self.read()

    def read(self) -> None:
        """Reads all trial records. Raises UserError naming one that is damaged."""
        for name in self._files():
            if name.endswith("/trial.json"):
                record = _record(storage.join(self.folder, name))
                self.records[record.number] = record

    def write(self, record: TrialRecord) -> None:
        """Writes the record of a trial."""
        self.records[record.number] = record
        text = json.dumps(dataclasses.asdict(record)) + "\n"
        storage.write(storage.join(self.trial_folder(record), "trial.json"), text.encode())

    def trial_folder(self, record: TrialRecord) -> str:
        """The folder of a trial."""
        return storage.join(self.folder, record.name)

    def ended(self) -> list[TrialRecord]:
        """The trials that ended, in order of their numbers."""
        return [record for _, record in sorted(self.records.items()) if record.is_over]

    def clear(self) -> None:
        """Removes all records, or warns if the tracking store still lacks parts of the trials' runs."""
        if unsent := [name for name in self._files() if name.endswith("unsent.json")]:
            log.warning(
                "%d child runs are not yet complete in the tracking store: run the same command again to send them",
                len(unsent),
            )
            return
        storage.remove(self.folder)
        storage.remove(self._identity_file)

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
        raise UserError(f"{url} is not the record of a trial: remove it, and that trial is run again")
    # A trial that was running when the driver was killed starts again, and reports its epochs again.
    return record if record.is_over else dataclasses.replace(record, reports=[])


def _parsed(url: str) -> dict[str, Any]:
    try:
        found = config.read_json(storage.read(url))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{url} is damaged: remove it and start the same command again")
    return found
