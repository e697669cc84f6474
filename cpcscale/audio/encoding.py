"""int16 samples as the bytes of a file."""

from __future__ import annotations

import io
import zlib

import numpy as np
import soundfile

RATE_HZ = 16_000
_FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
CODECS = tuple(_FORMATS)
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def encode(wave: np.ndarray, codec: str) -> bytes:
    """The int16 signal [S] at 16 kHz as the bytes of a file; `codec` is wav, flac or opus. Same signal, same bytes.

    >>> from cpcscale import audio
    >>> audio.decode(encode(np.array([0, 16384], np.int16), "flac")).tolist()
    [0.0, 0.5]
    """
    form, subtype = _FORMATS[codec]
    out = io.BytesIO()
    soundfile.write(out, wave, RATE_HZ, format=form, subtype=subtype)
    return _with_serial_zero(out.getvalue()) if form == "OGG" else out.getvalue()


def _with_serial_zero(ogg: bytes) -> bytes:
    """The Ogg file with its random serial number set to 0 and each page's checksum computed again (RFC 3533)."""
    pages, start = bytearray(ogg), 0
    while start < len(pages):
        lengths = pages[start + 27 : start + 27 + pages[start + 26]]
        stop = start + 27 + len(lengths) + sum(lengths)
        pages[start + 14 : start + 18] = bytes(4)
        pages[start + 22 : start + 26] = bytes(4)
        # Ogg's CRC is zlib's without its inversions, and with the bits of each byte and of the result reversed.
        mirrored = ~zlib.crc32(pages[start:stop].translate(_MIRRORED), 0xFFFFFFFF) & 0xFFFFFFFF
        pages[start + 22 : start + 26] = mirrored.to_bytes(4, "big").translate(_MIRRORED)
        start = stop
    return bytes(pages)
