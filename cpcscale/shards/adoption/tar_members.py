"""Reads the members of a tar, local or in a store, in one pass; nothing is unpacked to disk."""

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
    """One entry of a tar other than a folder. `kind` is "" for a plain file, else the kind of entry in words.

    `data` is the content, which starts at byte `offset` of the tar; empty if its suffix was not asked for.
    """

    name: str
    offset: int
    size: int
    kind: str
    data: bytes

    @property
    def key(self) -> str:
        """The name without suffix, and without a leading ./ or /."""
        return self._parts[0]

    @property
    def suffix(self) -> str:
        """The suffix in lower case, with its dot; empty if there is none."""
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, str]:
        plain = self.name.removeprefix("./").lstrip("/")
        stem, suffix = posixpath.splitext(plain)
        return stem, suffix.lower()


class TarScan:
    """One pass over the tar at `url`; after the last member, its `sha256`, `size_bytes` and `fault` are known.

    `fault` says what is wrong with the tar; it is empty for a whole one. A tar without `end_mark` may have been cut
    between two members, or its writer omitted the mark.
    """

    def __init__(self, url: str) -> None:
        self.sha256, self.size_bytes, self.fault, self.end_mark = b"", 0, "", True
        self._url = url

    def members(self, suffixes: tuple[str, ...]) -> Iterator[TarMember]:
        """The entries in order, with the data of plain files of these suffixes. Reads all formats that `tar` writes.

        Raises UserError for a tar that is compressed or cannot be read.
        """
        reader = _ForwardReader(self._url)
        end = 0
        try:
            for member, after in _members(reader, suffixes):
                end = after
                if member:
                    yield member
        except (tarfile.TarError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            self.fault = f"it is cut short or damaged ({' '.join(str(error).split())})"
        while reader.read(_BUFFER_BYTES):
            pass
        self.sha256, self.size_bytes = reader.digest.digest(), reader.size
        self.end_mark = reader.size >= end + _BLOCK_BYTES
        # tarfile takes a damaged header for the end of the tar, and does not read past the end mark.
        if not self.fault and reader.content_end > end:
            self.fault = f"what follows byte {end} is not a member: it is damaged there, or several tars were joined"


def _members(reader: _ForwardReader, suffixes: tuple[str, ...]) -> Iterator[tuple[TarMember | None, int]]:
    """Yields each entry (None for a folder) and the byte where the next one begins."""
    # Of a stream, tarfile calls only read().
    file: Any = reader
    with tarfile.open(
        fileobj=file, mode="r|", bufsize=_BUFFER_BYTES, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        while (info := tar.next()) is not None:
            # tarfile keeps every entry that it has read.
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


class _ForwardReader:
    """A file that is read forward only, and the sha256 and length of what was read."""

    def __init__(self, url: str) -> None:
        self.digest, self.size = sha256(), 0
        # The end of the content: one past the last byte that is not zero.
        self.content_end = 0
        self._url, self._chunks, self._chunk = url, storage.chunks(url), memoryview(b"")

    def read(self, count: int) -> bytes:
        """The next bytes, at most `count`; empty at the end."""
        if not self._chunk:
            self._chunk = memoryview(self._next())
        piece, self._chunk = self._chunk[:count], self._chunk[count:]
        return bytes(piece)

    def _next(self) -> bytes:
        chunk = next(self._chunks, b"")
        if not self.size:
            packer = next((name for magic, name in _PACKERS.items() if chunk.startswith(magic)), "")
            if packer:
                raise UserError(f"{self._url} is compressed with {packer}, despite its name: {WAY_OUT}")
        self.digest.update(chunk)
        if content := len(chunk.rstrip(b"\0")):
            self.content_end = self.size + content
        self.size += len(chunk)
        return chunk
