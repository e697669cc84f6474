"""Where the audio of a file ends by its container, against where the file ends: what was cut off, what follows.

libsndfile takes a WAV, AIFF, AU or SPHERE file that was cut for a shorter one, and ends at the first of two streams in
one file. Each reader here gives what the container states of its audio, without decoding.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cpcscale.audio import mp3

# A file written to a pipe states 0, or nearly the largest number, for the bytes of its audio.
_PIPED_BYTES = 0x7F000000
# So many bytes behind the audio may be anything: padding, a line end.
_SLACK_BYTES = 64
_READ_BYTES = 1 << 20
# More than one FLAC frame or Ogg page, which is looked for at the end of the file.
_TAIL_BYTES = 1 << 16
_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"


class RawFile(Protocol):
    """What is needed of a file."""

    def read(self, size: int, /) -> bytes | None: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...


@dataclass(frozen=True)
class AudioEnd:
    """The bytes of a file's audio that are `present` and those `missing`, and the bytes that `follow` it unread.

    `missing` and `following` are 0 where the container states no end. `header` is where the number of bytes of audio of
    a WAV or AU written to a pipe is stated as 0, else None.
    """

    present: int
    missing: int = 0
    following: int = 0
    header: int | None = None


def find_end(file: RawFile) -> AudioEnd:
    """The end of the audio by the container's own statement; `present` is 0 for containers that state none."""
    size = file.seek(0, 2)
    head = _at(file, 0, 1024)
    kind = head[:4]
    if kind in (b"RIFF", b"RF64", b"RIFX"):
        return _chunks(
            file, size, 12, b"data", ">" if kind == b"RIFX" else "<", _ds64(head) if kind == b"RF64" else None
        )
    if kind == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _chunks(file, size, 12, b"SSND", ">", None)
    if kind == b".snd" and len(head) >= 24:
        start, stated = struct.unpack_from(">II", head, 4)
        return _end(file, size, start, stated, 8)
    if kind == b"caff":
        return _caf(file, size)
    if head.startswith(_W64_RIFF):
        return _w64(file, size)
    if head.startswith(b"NIST_1A\n"):
        return _sphere(file, size, head)
    return AudioEnd(0)


def find_stream(file: RawFile) -> str:
    """What stands behind the first stream of a FLAC or Ogg file, in words; empty if nothing does. Reads all of it."""
    start = mp3.tag_end(file)
    head = _at(file, start, 4)
    if head == b"fLaC":
        # A stream begins with a STREAMINFO block of 34 bytes.
        marks: tuple[bytes, ...] = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
    elif head == b"OggS":
        # The first page of a stream. Streams that are interleaved all begin at the start, before any page of audio.
        marks = (b"OggS\x00\x02",)
    else:
        return ""
    for at in _found(file, marks):
        if at > start:
            return f"another {head.decode()} stream begins at byte {at}"
    return ""


def is_ogg_cut(file: RawFile) -> bool:
    """Whether an Ogg file ends inside a page."""
    pages = _last_pages(file)
    return bool(pages) and len(pages[-1]) < _page_bytes(pages[-1])


def find_open_end(file: RawFile) -> tuple[str, str] | None:
    """(cause, why) if the end of an Ogg file is not certain; None if it is.

    A writer marks the last page of a stream. libsndfile ends at the last page that states a position, and says nothing
    of audio behind it.
    """
    pages = [page for page in _last_pages(file) if len(page) >= 27]
    # A page on which no packet ends states -1, and may be empty.
    ending = next((page for page in reversed(pages) if any(byte < 255 for byte in page[27 : 27 + page[26]])), b"")
    if ending[6:14] == b"\xff" * 8:
        return "longer", "its last page of audio states no position"
    if pages and not pages[-1][5] & 4:
        return "cut", "its last page is not marked as the last, as where a writer or a copy was stopped"
    return None


def _last_pages(file: RawFile) -> list[bytes]:
    """The pages of an Ogg file that begin in its last bytes, one at least, from their header to the next page."""
    size = file.seek(0, 2)
    tail = _at(file, max(0, size - _TAIL_BYTES), _TAIL_BYTES)
    starts = [match.start() for match in re.finditer(rb"OggS(?=\x00|$)", tail)]
    return [tail[start:stop] for start, stop in zip(starts, [*starts[1:], len(tail)], strict=True)]


def _page_bytes(page: bytes) -> int:
    """How many bytes an Ogg page has by its header; more than there are if the header is cut."""
    segments = page[26] if len(page) > 26 else 0
    return 27 + segments + sum(page[27 : 27 + segments])


def _end(file: RawFile, size: int, start: int, stated: int, header: int | None = None) -> AudioEnd:
    """The end of audio that begins at byte `start` and is stated to have `stated` bytes, as the last part of a file."""
    there = max(0, size - start)
    if stated == 0 and there > _SLACK_BYTES:
        return AudioEnd(there, header=header)
    if stated > there:
        piped = _PIPED_BYTES <= stated < 1 << 32 or stated >= 1 << 62
        return AudioEnd(there, 0 if piped else stated - there)
    return AudioEnd(stated, following=_audio_behind(file, start + stated, size))


def _chunks(file: RawFile, size: int, at: int, wanted: bytes, order: str, ds64: int | None) -> AudioEnd:
    """Of a file of chunks of IFF's form: name, bytes, content, padded to an even length."""
    while at + 8 <= size:
        name, stated = struct.unpack(f"{order}4sI", _at(file, at, 8))
        if name == wanted:
            if ds64 is not None and stated == 0xFFFFFFFF:
                stated = ds64
            # A chunk that follows an empty one makes it really empty.
            if stated == 0 and _is_chunk(_at(file, at + 8, 4)):
                return AudioEnd(0)
            end = _end(file, size, at + 8, stated, at + 4)
            behind = at + 8 + stated + (stated & 1)
            return AudioEnd(end.present) if end.following and _is_chunk(_at(file, behind, 4)) else end
        at += 8 + stated + (stated & 1)
    return AudioEnd(0)


def _is_chunk(name: bytes) -> bool:
    """Whether these bytes are the name of a chunk; that of a new file is none."""
    return (
        len(name) == 4
        and name.isascii()
        and name.decode().isprintable()
        and name not in (b"RIFF", b"FORM", b"RF64", b"caff")
    )


def _ds64(head: bytes) -> int | None:
    at = head.find(b"ds64")
    return struct.unpack_from("<Q", head, at + 16)[0] if 0 < at <= len(head) - 24 else None


def _caf(file: RawFile, size: int) -> AudioEnd:
    at = 8
    while at + 12 <= size:
        name, stated = struct.unpack(">4sq", _at(file, at, 12))
        if name == b"data":
            if stated < 0:
                return AudioEnd(size - at - 12)
            end = _end(file, size, at + 12, stated)
            return AudioEnd(end.present) if end.following and _is_chunk(_at(file, at + 12 + stated, 4)) else end
        if stated < 0:
            break
        at += 12 + stated
    return AudioEnd(0)


def _w64(file: RawFile, size: int) -> AudioEnd:
    at = 40
    while at + 24 <= size:
        name, stated = struct.unpack("<16sQ", _at(file, at, 24))
        if name.startswith(b"data"):
            return _end(file, size, at + 24, max(0, stated - 24))
        at += max(24, stated + -stated % 8)
    return AudioEnd(0)


def _sphere(file: RawFile, size: int, head: bytes) -> AudioEnd:
    fields = {parts[0]: parts[2] for line in head.split(b"\n") if len(parts := line.split()) == 3}
    try:
        start = int(head.split(b"\n", 2)[1])
        count, width = int(fields[b"sample_count"]), int(fields.get(b"sample_n_bytes", b"2"))
        return _end(file, size, start, count * width * int(fields.get(b"channel_count", b"1")))
    except (KeyError, ValueError, IndexError):
        return AudioEnd(0)


def _audio_behind(file: RawFile, start: int, size: int) -> int:
    """How many bytes stand behind the audio, unless they are few, all zero, or a tag."""
    if size - start <= _SLACK_BYTES or _at(file, start, 11).startswith((b"TAG", b"ID3", b"APETAGEX")):
        return 0
    file.seek(start)
    while block := file.read(_READ_BYTES):
        if any(block):
            return size - start
    return 0


def _found(file: RawFile, marks: tuple[bytes, ...]) -> Iterator[int]:
    """Where each of the marks stands in the file, in order of blocks."""
    file.seek(0)
    before, at = b"", 0
    while block := file.read(_READ_BYTES):
        data = before + block
        for mark in marks:
            place = data.find(mark)
            while place >= 0:
                yield at - len(before) + place
                place = data.find(mark, place + 1)
        at += len(block)
        before = data[-(max(map(len, marks)) - 1) :]


def _at(file: RawFile, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count) or b""
