"""A folder that is whole or not: its files, then a marker that lists each with its size and hash, written last."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cpcscale import config, storage
from cpcscale.errors import UserError

MARKER = "COMPLETE.json"


class TornError(UserError):
    """The folder is incomplete or damaged; another copy may be whole."""


@dataclass(frozen=True)
class MarkedFile:
    """A file's size and hash as the marker gives them."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class FolderFormat:
    """A kind of such folders: `what` it is, the `number` of its format, and the file that each has.

    A marker may come from anywhere, and the names in it are opened: nothing but `names` is accepted.
    """

    what: str
    number: int
    needs: str
    names: re.Pattern[str]

    def write(self, url: str, contents: Mapping[str, bytes]) -> None:
        """Writes the files into the folder `url`, then their marker."""
        for name, data in contents.items():
            storage.write(storage.join(url, name), data)
        listed = {name: {"bytes": len(data), "sha256": _digest(data)} for name, data in contents.items()}
        marker = json.dumps({"format": self.number, "files": listed}, indent=1)
        storage.write(storage.join(url, MARKER), marker.encode())

    def read_marker(self, url: str) -> dict[str, MarkedFile]:
        """{name: size and hash} of the files of the folder `url`, from its marker.

        Raises TornError when the marker is missing or damaged, and UserError when the folder has another format.
        """
        try:
            read = config.read_json(storage.read(storage.join(url, MARKER)))
            number = int(read.get("format", 1))
            files = {
                name: MarkedFile(int(file["bytes"]), str(file["sha256"]))
                for name, file in read.get("files", {}).items()
            }
        except storage.NotFoundError:
            raise TornError(f"{url} is not a whole {self.what}: it has no {MARKER}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise TornError(f"{url} is torn: {MARKER} is damaged") from None
        if number != self.number:
            raise UserError(
                f"{url} has {self.what} format {number}, this cpcscale reads {self.number}: use the version that "
                "wrote it"
            )
        if self.needs not in files or not all(self.names.fullmatch(name) for name in files):
            raise TornError(f"{url} is torn: {MARKER} is damaged")
        return files

    def read_files(self, url: str) -> dict[str, bytes]:
        """{name: bytes} of the folder `url`, checked against the marker. Raises TornError on a mismatch."""
        found = {}
        for name, file in self.read_marker(url).items():
            try:
                found[name] = storage.read(storage.join(url, name))
            except storage.NotFoundError:
                raise TornError(f"{url} is torn: {name} is missing") from None
            if _digest(found[name]) != file.sha256:
                raise TornError(f"{url} is torn: {name} does not match the hash in {MARKER}")
        return found

    def find_problems(self, url: str, *, every_byte: bool) -> Iterator[str]:
        """Describes each problem of the folder `url` in a few words.

        Checks sizes only; with `every_byte` it reads the files and checks their hashes too.
        """
        try:
            files = self.read_marker(url)
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


def content_digest(url: str) -> str:
    """The sha256 of the marker in the folder `url`, which lists the hash of each file: it names exactly these files."""
    return _digest(storage.read(storage.join(url, MARKER)))


def remove(url: str) -> None:
    """Removes such a folder, the marker first, so that a half-removed one never looks whole."""
    storage.remove(storage.join(url, MARKER))
    storage.remove(url)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_of(url: str) -> str:
    digest = hashlib.sha256()
    for chunk in storage.chunks(url):
        digest.update(chunk)
    return digest.hexdigest()
