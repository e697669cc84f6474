"""The length of an MP3 by counting its frames (ISO/IEC 11172-3, layer III), and the Xing frame of encoders."""

from __future__ import annotations

import io

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_KBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_LOW = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
# No frame is longer.
_FRAME_BYTES = 4096
_READ_BYTES = 1 << 20


def count(file: io.RawIOBase | io.BufferedReader) -> tuple[int, int] | None:
    """(samples, samples in a frame) by counting frames, or None if the first frame states the length."""
    file.seek(_tag_bytes(file.read(10) or b""))
    frames, samples, data, at = 0, 1152, b"", 0
    while True:
        if len(data) - at < _FRAME_BYTES:
            # The first frame may state the length: then no more is read.
            data, at = data[at:] + (file.read(_READ_BYTES if frames else _FRAME_BYTES) or b""), 0
            if len(data) < 4:
                return frames * samples, samples
        size, here = _frame(int.from_bytes(data[at : at + 4], "big"))
        if size:
            samples = here
            if not frames and _has_length(data[at : at + size]):
                return None
            frames += 1
            at += size
        else:  # Not a frame: go on where the next one may start.
            found = data.find(b"\xff", at + 1)
            at = len(data) if found < 0 else found


def _tag_bytes(head: bytes) -> int:
    """The size of the ID3 tag at the start of the file: 10 bytes, and what four digits of 7 bits state."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    return 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))


def _has_length(frame: bytes) -> bool:
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    return 0 < at < len(frame) - 7 and bool(frame[at + 7] & 1)


def _frame(header: int) -> tuple[int, int]:
    """(bytes, samples) of the frame with this header of 32 bits; (0, 0) if it is not the header of a frame."""
    version, bitrate, rate = header >> 19 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or header >> 17 & 3 != 1 or bitrate in (0, 15) or rate == 3:
        return 0, 0
    kbits, samples = (_KBITS, 1152) if version == 3 else (_KBITS_LOW, 576)
    return samples // 8 * kbits[bitrate] * 1000 // _RATES[version][rate] + (header >> 9 & 1), samples
