"""The length of an MP3 by its frames (ISO/IEC 11172-3 and 13818-3), and what its first frame states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_LOW = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
# kbit/s by (MPEG-1 or not, layer).
_KBITS = {
    (True, 1): tuple(range(0, 449, 32)),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): _LOW,
    (False, 3): _LOW,
}
# No frame is longer.
_FRAME_BYTES = 4096
_READ_BYTES = 1 << 20
# What may follow the last frame and is no audio: ID3v1 and ID3v2, APE and Lyrics3 tags.
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")


class Readable(Protocol):
    """What is needed of a file."""

    def read(self, size: int, /) -> bytes | None: ...

    def seek(self, offset: int, /) -> int: ...


@dataclass(frozen=True)
class Frames:
    """The frames of an MP3: `count` whole ones of `samples` each, the one that states the length not among them.

    `stated` is the number that the Xing, Info or VBRI frame states; None without one, or if it states none. `cut` says
    whether the last frame is not whole. If counting stopped at a stated length, `count` is 0.
    """

    count: int
    samples: int
    stated: int | None
    cut: bool


def tag_end(file: Readable) -> int:
    """Where the audio begins behind ID3 tags at the start of a file, which stand before other formats too."""
    at = 0
    file.seek(0)
    while (head := file.read(10) or b"")[:3] == b"ID3":
        # 10 bytes, and what four digits of 7 bits state.
        at += 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
        file.seek(at)
    return at


def read_frames(file: Readable, trust: bool = False) -> Frames:
    """Counts the frames from the start of the file; with `trust`, reads no further than a first frame with a length."""
    file.seek(tag_end(file))
    count, samples, stated, data, at, whole = 0, 1152, None, b"", 0, False
    kind, first, chained = -1, True, False
    while True:
        if len(data) - at < 2 * _FRAME_BYTES and not whole:
            more = file.read(2 * _FRAME_BYTES if first else _READ_BYTES) or b""
            data, at, whole = data[at:] + more, 0, not more
            continue
        if len(data) - at < 4 or data.startswith(_TAGS, at):
            return Frames(count, samples, stated, False)
        size, here, this = _frame(data, at)
        if not size or kind not in (-1, this) or not (chained or _starts_frame(data, at + size, this)):
            # No frame, or bytes that look like one in a picture or in damaged audio: go on where one may start.
            found = data.find(b"\xff", at + 1)
            at, chained = len(data) if found < 0 else found, False
            continue
        if at + size > len(data):
            return Frames(count, samples, stated, True)
        kind, samples, chained = this, here, True
        if first and (known := _length(data[at : at + size])) is not None:
            stated = known or None
            if trust and stated:
                return Frames(0, samples, stated, False)
        else:
            count += 1
        first = False
        at += size


def _starts_frame(data: bytes, at: int, kind: int) -> bool:
    """Whether a frame of this kind, a tag or the end of the data stands at `at`."""
    return len(data) - at < 4 or data.startswith(_TAGS, at) or _frame(data, at)[2] == kind


def _length(frame: bytes) -> int | None:
    """The number of frames that a Xing, Info or VBRI frame states, 0 if it states none; None for a frame of audio."""
    if 0 < (at := frame.find(b"VBRI")) < 40 and len(frame) > at + 17:
        return int.from_bytes(frame[at + 14 : at + 18], "big")
    at = max(frame[:64].find(b"Xing"), frame[:64].find(b"Info"))
    if at < 0 or len(frame) < at + 12:
        return None
    return int.from_bytes(frame[at + 8 : at + 12], "big") if frame[at + 7] & 1 else 0


def _frame(data: bytes, at: int) -> tuple[int, int, int]:
    """(bytes, samples, kind) of the frame whose header stands at `at`; no bytes and a kind of -2 if it is no header.

    All frames of a file are of one kind: version, layer and rate.
    """
    header = int.from_bytes(data[at : at + 4], "big")
    version, layer, bitrate, rate = header >> 19 & 3, 4 - (header >> 17 & 3), header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return 0, 0, -2
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    slot = 4 if layer == 1 else 1
    kbits = _KBITS[version == 3, layer][bitrate]
    size = (samples // 8 // slot * kbits * 1000 // _RATES[version][rate] + (header >> 9 & 1)) * slot
    return size, samples, header >> 17 << 2 | rate
