"""The members of a tar, read once from its first byte to its last, wherever it lies; nothing is ever unpacked."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cpcscale import storage
from cpcscale.errors import UserError

_BLOCK_BYTES = tarfile.BLOCKSIZE
_BUFFER_BYTES = 1 << 16
_PACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
WAY_OUT = "members of a compressed tar cannot be read by range: decompress it and index the plain tar"


@dataclass(frozen=True)
class TarMember:
    """One entry of a tar that is no folder. `kind` is "" for a plain file, else what it is instead of one.

    `data` is the file's bytes, which begin at byte `offset` of the tar; empty for what was not asked for.
    """

    name: str
    offset: int
    size: int
    kind: str
    data: bytes

    @property
    def key(self) -> str:
        """The name without its suffix, and without the ./ or / that some writers put before it."""
        return self._parts[0]

    @property
    def suffix(self) -> str:
        """The suffix in small letters, with its dot; empty where there is none."""
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, str]:
        plain = self.name.removeprefix("./").lstrip("/")
        stem, suffix = posixpath.splitext(plain)
        return stem, suffix.lower()


class TarScan:
    """One pass over the tar at `url`. After the last member: its `sha256`, `size_bytes`, and what is wrong with it.

    `fault` is empty for a tar that is whole, as far as a tar can tell. A tar without its `end_mark` may be cut between
    two members, or its writer left the mark out.
    """

    def __init__(self, url: str) -> None:
        self.sha256, self.size_bytes, self.fault, self.end_mark = b"", 0, "", True
        self._url = url

    def members(self, suffixes: tuple[str, ...]) -> Iterator[TarMember]:
        """The tar's entries in order, with the bytes of plain files of these suffixes; all formats that `tar` writes.

        Raises UserError for a tar that is compressed or cannot be read from where it lies.
        """
        through = _Through(self._url)
        end = 0
        try:
            for member, after in _members(through, suffixes):
                end = after
                if member:
                    yield member
        except (tarfile.TarError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            self.fault = f"it is cut short or damaged ({' '.join(str(error).split())})"
        while through.read(_BUFFER_BYTES):
            pass
        self.sha256, self.size_bytes = through.digest.digest(), through.size
        self.end_mark = through.size >= end + _BLOCK_BYTES
        # tarfile takes a damaged header in mid-tar for the end, and does not look past the end mark.
        if not self.fault and through.content_end > end:
            self.fault = f"what follows byte {end} is no member: it is damaged there, or several tars were joined"


def _members(through: _Through, suffixes: tuple[str, ...]) -> Iterator[tuple[TarMember | None, int]]:
    """Each entry (None for a folder) with the byte where the next one begins."""
    # All that a stream's tarfile asks of its file is read().
    file: Any = through
    with tarfile.open(
        fileobj=file, mode="r|", bufsize=_BUFFER_BYTES, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        while (info := tar.next()) is not None:
            # tarfile keeps every entry that it has passed.
            tar.members.clear()  # type: ignore[attr-defined]
            kind, data = _kind(info), b""
            if kind == "" and info.name.lower().endswith(suffixes):
                assert tar.fileobj is not None
                tar.fileobj.seek(info.offset_data)
                data = tar.fileobj.read(info.size)
                if len(data) != info.size:
                    raise tarfile.ReadError(f"{info.name} ends after {len(data)} of {info.size} bytes")
            member = None if info.isdir() else TarMember(info.name, info.offset_data, info.size, kind, data)
            yield member, tar.offset


def _kind(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "sparse file"
    if info.isreg():
        return ""
    if info.islnk():
        return "hard link"
    return "symbolic link" if info.issym() else "special file"


class _Through:
    """A file that goes forward only, with the digest and the length of what went through."""

    def __init__(self, url: str) -> None:
        self.digest, self.size = sha256(), 0
        # One past the last byte that is not zero.
        self.content_end = 0
        self._url, self._chunks, self._chunk = url, storage.chunks(url), memoryview(b"")

    def read(self, count: int) -> bytes:
        """The next bytes, at most `count`; none at the end."""
        if not self._chunk:
            self._chunk = memoryview(self._next())
        piece, self._chunk = self._chunk[:count], self._chunk[count:]
        return bytes(piece)

    def _next(self) -> bytes:
        chunk = next(self._chunks, b"")
        if not self.size:
            packer = next((name for magic, name in _PACKERS.items() if chunk.startswith(magic)), "")
            if packer:
                raise UserError(f"{self._url} is compressed with {packer}, for all its name: {WAY_OUT}")
        self.digest.update(chunk)
        if content := len(chunk.rstrip(b"\0")):
            self.content_end = self.size + content
        self.size += len(chunk)
        return chunk
