"""The files of a checkpoint: tensors, state, and a marker that lists each file with its size and hash.

`RUN/checkpoints/step-00000500-0003/` holds `model.safetensors`, `optimizer.safetensors`, further tensors if the run has
any, `state.json` and, written last, `COMPLETE.json` (the marker). The second number in the name identifies the writer
(ledger.py), so two writers never share a folder. A checkpoint is torn when its files do not match its marker.
"""

from __future__ import annotations

import re
from typing import Any

from cpcscale import config, storage
from cpcscale.storage.marked_folder import MARKER as MARKER
from cpcscale.storage.marked_folder import FolderFormat, TornError
from cpcscale.storage.marked_folder import remove as remove

STATE, TENSORS = "state.json", ".safetensors"
_FOLDER = re.compile(r"step-(\d+)(?:-(\d+))?")
CHECKPOINT = FolderFormat("checkpoint", 2, STATE, re.compile(r"[a-z][a-z0-9_]*\.(safetensors|json)"))
write, read_marker = CHECKPOINT.write, CHECKPOINT.read_marker
read_files, find_problems = CHECKPOINT.read_files, CHECKPOINT.find_problems


def folder_name(step: int, writer: int) -> str:
    """The folder name of a checkpoint: its step and the number of its writer."""
    return f"step-{step:08d}-{writer:04d}"


def parse_folder_name(folder: str) -> tuple[int, int] | None:
    """(step, writer) from the name of a checkpoint's folder, or None if it is not such a name."""
    match = _FOLDER.fullmatch(folder)
    return (int(match.group(1)), int(match.group(2) or 0)) if match else None


def read_state(url: str) -> dict[str, Any]:
    """`state.json` of the checkpoint in folder `url`, not checked against its hash. Raises TornError without one."""
    try:
        return parse_state(url, storage.read(storage.join(url, STATE)))
    except storage.NotFoundError:
        raise TornError(f"{url} is torn: {STATE} is missing") from None


def parse_state(url: str, data: bytes) -> dict[str, Any]:
    """Parses the bytes of a `state.json`. Raises TornError when they are none."""
    try:
        found = config.read_json(data)
        if isinstance(found["position"], dict):
            return dict(found)
    except (ValueError, TypeError, KeyError):
        pass
    raise TornError(f"{url} is torn: {STATE} is damaged")
