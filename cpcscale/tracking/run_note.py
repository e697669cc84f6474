"""`RUN/run.json`: the MLflow run of a run folder, with the kind of the run, the folder's place, and its driver.

A folder that was copied holds the same note. Its copy must not write to the first folder's MLflow run. The driver is
named while it works; if it is named and dead, its MLflow run says RUNNING and is not.
"""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.machine import ProcessMark
from cpcscale.tracking.outbox import read_note

logger = logging.getLogger(__name__)

NAME, UNSENT = "run.json", "unsent.json"


def read(run_dir: str) -> dict[str, Any]:
    """The note of a folder; empty for a new one."""
    note = read_note(storage.join(run_dir, NAME))
    # An earlier version noted a place as it was typed.
    return note | ({"place": storage.absolute(str(note["place"]))} if note.get("place") else {})


def read_own(run_dir: str, kind: str) -> tuple[str | None, dict[str, str]]:
    """(id of the MLflow run that this folder goes on in, tags that name the run it was copied from).

    The id is None for a new folder and for a copy. A folder was moved, not copied, if its old place on this machine
    or in this store no longer holds the run. Raises UserError for a folder that holds a run of another kind.
    """
    note = read(run_dir)
    refuse_other_kind(run_dir, kind, note)
    known = str(note["run_id"]) if note.get("kind") == kind and note.get("run_id") else None
    before = str(note.get("place", ""))
    if known is None or not before or before == storage.absolute(run_dir):
        return known, {}
    try:
        same_machine = storage.local_path(before) is None or note.get("host") == socket.gethostname()
        still_there = read_note(storage.join(before, NAME)).get("run_id") == known
        first, here = storage.local_path(before), storage.local_path(run_dir)
        if still_there and first and here and first.exists() and first.samefile(here):
            return known, {}  # Another path to the same folder, such as a link.
    except UserError:  # The old place cannot be read: it may still be written to.
        same_machine, still_there = False, True
    if same_machine and not still_there:
        return known, {}
    logger.warning("%s is a copy of the run in %s: it is tracked as a new run", storage.shown(run_dir), before)
    return None, {"cpcscale.copied_from": known, "cpcscale.copied_from_place": before}


def refuse_other_kind(run_dir: str, kind: str, note: dict[str, Any]) -> None:
    """Raises UserError when `run_dir` holds a tracked run of another kind than `kind`."""
    if (there := note.get("kind", kind)) != kind:
        raise UserError(
            f"run_dir={storage.shown(run_dir)} holds a run of {there}, and this is {kind}: name another run_dir"
        )


def is_abandoned(run_dir: str, note: dict[str, Any]) -> bool:
    """Whether the folder's driver is gone before it had ended its MLflow run, or had sent all records."""
    if not note.get("run_id") or note.get("place") != storage.absolute(run_dir):
        return False
    if driver := note.get("driver"):
        return ProcessMark(*driver).lives() is False
    return storage.exists(storage.join(run_dir, UNSENT))


def write(run_dir: str, run_id: str, kind: str, name: str, experiment: str) -> None:
    """Names the MLflow run of a folder, and this process as its driver."""
    note: dict[str, Any] = {"run_id": run_id, "kind": kind, "name": name, "experiment": experiment}
    note |= {"place": storage.absolute(run_dir), "host": socket.gethostname(), "driver": [*ProcessMark.own()]}
    _write(run_dir, note)


def end(run_dir: str, run_id: str) -> None:
    """Takes the driver's name away, unless the folder has another MLflow run by now."""
    note = read(run_dir)
    if note.get("run_id") == run_id and note.pop("driver", None):
        _write(run_dir, note)


def _write(run_dir: str, note: dict[str, Any]) -> None:
    storage.write(storage.join(run_dir, NAME), (json.dumps(note, indent=1) + "\n").encode())
