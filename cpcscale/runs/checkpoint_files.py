"""The files of a checkpoint: tensors, state, and a marker that lists each file with its size and hash.

`RUN/checkpoints/step-00000500-0003/` holds `model.safetensors`, `optimizer.safetensors`, further tensors if the run has
any, `state.json` and, written last, `COMPLETE.json` (the marker). The second number in the name identifies the writer
(ledger.py), so two writers never share a folder. A checkpoint is torn when its files do not match its marker.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpcscale import config, storage
from cpcscale.errors import UserError

MARKER, STATE, TENSORS = "COMPLETE.json", "state.json", ".safetensors"
FORMAT = 2
_FOLDER = re.compile(r"step-(\d+)(?:-(\d+))?")
# A marker may come from anywhere, and the names in it are opened: nothing but plain file names is accepted.
_NAME = re.compile(r"[a-z][a-z0-9_]*\.(safetensors|json)")


class TornError(UserError):
    """The checkpoint is incomplete or damaged; an older one may be whole."""


@dataclass(frozen=True)
class MarkedFile:
    """A file's size and hash as the marker gives them."""

    bytes: int
    sha256: str


def folder_name(step: int, writer: int) -> str:
    """The folder name of a checkpoint: its step and the number of its writer."""
    return f"step-{step:08d}-{writer:04d}"


def parse_folder_name(folder: str) -> tuple[int, int] | None:
    """(step, writer) from the name of a checkpoint's folder, or None if it is not such a name."""
    match = _FOLDER.fullmatch(folder)
    return (int(match.group(1)), int(match.group(2) or 0)) if match else None


def write(url: str, contents: Mapping[str, bytes]) -> None:
    """Writes the files into the folder `url`, then their marker."""
    for name, data in contents.items():
        storage.write(storage.join(url, name), data)
    listed = {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in contents.items()}
    storage.write(storage.join(url, MARKER), json.dumps({"format": FORMAT, "files": listed}, indent=1).encode())


def remove(url: str) -> None:
    """Removes a checkpoint's folder, the marker first, so that a half-removed checkpoint never looks whole."""
    storage.remove(storage.join(url, MARKER))
    storage.remove(url)


def read_marker(url: str) -> dict[str, MarkedFile]:
    """{name: size and hash} of the files of the checkpoint in folder `url`, from its marker.

    Raises TornError when the marker is missing or damaged, and UserError when the checkpoint has another format.
    """
    try:
        read = config.read_json(storage.read(storage.join(url, MARKER)))
        number = int(read.get("format", 1))
        files = {
            name: MarkedFile(int(file["bytes"]), str(file["sha256"])) for name, file in read.get("files", {}).items()
        }
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
    """{name: bytes} of the checkpoint in folder `url`, checked against the marker. Raises TornError on a mismatch."""
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
    """Describes each problem of the checkpoint in folder `url` in a few words.

    Checks sizes only; with `every_byte` it reads the files and checks their hashes too.
    """
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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(url: str) -> str:
    digest = hashlib.sha256()
    for chunk in storage.chunks(url):
        digest.update(chunk)
    return digest.hexdigest()
