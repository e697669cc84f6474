"""A checkpoint as files: any number of them, then the marker that names each with its size and hash.

`RUN/checkpoints/step-00000500-0003/` holds `model.safetensors`, `optimizer.safetensors`, what further tensors a run
has, `state.json` and, written last, `COMPLETE.json`. The second number tells writers apart (ledger.py), so that no two
ever write into one folder. A folder without a marker that matches its files is torn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpcscale import storage
from cpcscale.errors import UserError

MARKER, STATE, TENSORS = "COMPLETE.json", "state.json", ".safetensors"
FORMAT = 2
_FOLDER = re.compile(r"step-(\d+)(?:-(\d+))?")
# A marker may come from anywhere, and a name in it is opened.
_NAME = re.compile(r"[a-z][a-z0-9_]*\.(safetensors|json)")


class TornError(UserError):
    """A checkpoint that is not whole: an older one may be."""


@dataclass(frozen=True)
class MarkedFile:
    """What the marker says of a file."""

    bytes: int
    sha256: str


def folder_name(step: int, writer: int) -> str:
    """The name of the folder of the checkpoint that this writer makes of `step`."""
    return f"step-{step:08d}-{writer:04d}"


def parse_folder_name(folder: str) -> tuple[int, int] | None:
    """(step, writer) of the name of a checkpoint's folder, or None for another name."""
    match = _FOLDER.fullmatch(folder)
    return (int(match.group(1)), int(match.group(2) or 0)) if match else None


def write(url: str, contents: Mapping[str, bytes]) -> None:
    """Writes the files into the folder `url`, then their marker."""
    for name, data in contents.items():
        storage.write(storage.join(url, name), data)
    listed = {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in contents.items()}
    storage.write(storage.join(url, MARKER), json.dumps({"format": FORMAT, "files": listed}, indent=1).encode())


def remove(url: str) -> None:
    """Removes a checkpoint's folder, the marker first: one that is half removed must not look whole."""
    storage.remove(storage.join(url, MARKER))
    storage.remove(url)


def read_marker(url: str) -> dict[str, MarkedFile]:
    """The files of the checkpoint in folder `url` by name. Raises TornError, and UserError for another format."""
    try:
        read = json.loads(storage.read(storage.join(url, MARKER)))
        number = int(read.get("format", 1))
        files = {name: MarkedFile(int(file["bytes"]), str(file["sha256"])) for name, file in read.get("files", {}).items()}
    except storage.NotFoundError:
        raise TornError(f"{url} is not a whole checkpoint: it has no {MARKER}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise TornError(f"{url} is torn: {MARKER} is damaged") from None
    if number != FORMAT:
        raise UserError(
            f"{url} has checkpoint format {number}, this cpcscale reads {FORMAT}: use the version that wrote it"
        )
    if STATE not in files or not all(_NAME.fullmatch(name) for name in files):
        raise TornError(f"{url} is torn: {MARKER} is damaged")
    return files


def read_files(url: str) -> dict[str, bytes]:
    """Every file of the checkpoint in folder `url`, checked against the marker. Raises TornError when it is torn."""
    found = {}
    for name, file in read_marker(url).items():
        try:
            found[name] = storage.read(storage.join(url, name))
        except storage.NotFoundError:
            raise TornError(f"{url} is torn: {name} is missing") from None
        if _digest(found[name]) != file.sha256:
            raise TornError(f"{url} is torn: {name} does not match the hash in {MARKER}")
    return found


def find_problems(url: str, *, every_byte: bool) -> Iterator[str]:
    """What is wrong with the checkpoint in folder `url`, in a few words each; sizes alone, or `every_byte`."""
    try:
        files = read_marker(url)
    except TornError as error:
        yield str(error).rpartition(": ")[2]
        return
    for name, file in files.items():
        place = storage.join(url, name)
        try:
            found = storage.size(place)
        except storage.NotFoundError:
            yield f"{name} is missing"
            continue
        if found != file.bytes:
            yield f"{name} has {found} of {file.bytes} bytes"
        elif every_byte and _digest_of(place) != file.sha256:
            yield f"{name} does not match the hash in {MARKER}"


def read_state(url: str) -> dict[str, Any]:
    """What `state.json` of the checkpoint in folder `url` says, not checked. Raises TornError when it says nothing."""
    try:
        return parse_state(url, storage.read(storage.join(url, STATE)))
    except storage.NotFoundError:
        raise TornError(f"{url} is torn: {STATE} is missing") from None


def parse_state(url: str, data: bytes) -> dict[str, Any]:
    """The content of a `state.json`. Raises TornError when it is not one."""
    try:
        found = json.loads(data)
        if isinstance(found["position"], dict):
            return dict(found)
    except (ValueError, TypeError, KeyError):
        pass
    raise TornError(f"{url} is torn: {STATE} is damaged")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(url: str) -> str:
    digest = hashlib.sha256()
    for chunk in storage.chunks(url):
        digest.update(chunk)
    return digest.hexdigest()
