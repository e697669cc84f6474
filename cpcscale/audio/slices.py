"""Slices of encoded utterances, as training decodes them."""

from __future__ import annotations

import io
import os
import struct
import threading

import numpy as np
import soundfile

from cpcscale.audio import ends
from cpcscale.audio.encoding import RATE_HZ
from cpcscale.audio.files import WRITE_AGAIN, decode, why_failed
from cpcscale.audio.sound import to_int16
from cpcscale.errors import AudioError

_thread = threading.local()


def decode_slice(data: bytes | memoryview, start: int, count: int, out: np.ndarray | None = None) -> np.ndarray:
    """Samples [start, start + count) of an encoded utterance at 16 kHz mono, int16 [count]; written to `out` if given.

    Audio of another rate or with more channels is decoded whole, as by `decode`, and then cut, so that the samples do
    not depend on the slice. Raises AudioError with cause `unreadable` when the bytes do not decode, and `cut` when the
    audio ends before the slice does.
    """
    assert start >= 0
    wave = np.empty(count, np.int16) if out is None else out
    plain = _pcm16(data)
    if plain is not None:
        part = plain[start : start + count]
    else:
        try:
            with _in_memory(data) as file:
                # A file written to a pipe may state no frames.
                if (file.samplerate, file.channels) != (RATE_HZ, 1) or not file.frames:
                    part = to_int16(decode(bytes(data)))[start : start + count]
                else:
                    # A slice may start past the end; libsndfile refuses to seek there.
                    file.seek(min(start, file.frames))
                    exact = file.subtype == "PCM_16"
                    part = file.read(count, "int16", out=wave) if exact else to_int16(file.read(count, "float32"))
        except (soundfile.LibsndfileError, OSError) as error:
            raise AudioError("unreadable", f"a member cannot be decoded: {why_failed(error)}") from None
    if len(part) != count:
        raise AudioError("cut", f"a member ends at sample {start + len(part)}, before {start + count}")
    if part is not wave:
        wave[:] = part
    return wave


def check_slices(data: bytes, wave: np.ndarray) -> None:
    """Raises AudioError with cause `seeks` if slices of a file are not those of its whole int16 signal `wave` [S].

    Three are tried, the last at the end; those of a lossy coder may differ a little.
    """
    count = min(len(wave), RATE_HZ // 10)
    for start in sorted({0, (len(wave) - count) // 2, len(wave) - count}):
        expected = wave[start : start + count].astype(np.float64)
        try:
            found = decode_slice(data, start, count).astype(np.float64)
            off, level = (float(np.sqrt(np.square(each).mean())) for each in (found - expected, expected))
            how = "it gives other audio than decoded as a whole" if off > max(200.0, level / 2) else ""
        except AudioError as error:
            if error.cause == "cut":
                raise
            how = f"{error}, though it decodes as a whole"
        if how:
            why = f"decoded from sample {start} on, {how}: {WRITE_AGAIN}"
            raise AudioError("seeks", why, len(wave) / RATE_HZ)


def _in_memory(data: bytes | memoryview) -> soundfile.SoundFile:
    """The bytes as an open file that libsndfile reads without Python, as `_opened` does.

    Each thread keeps one anonymous file for this, which must be read before the next call.
    """
    if not hasattr(os, "memfd_create"):
        return soundfile.SoundFile(io.BytesIO(data))
    if getattr(_thread, "process", None) != os.getpid():
        # A forked process must not share the file of its parent.
        _thread.file, _thread.process = os.fdopen(os.memfd_create("audio"), "r+b", buffering=0), os.getpid()
    descriptor = _thread.file.fileno()
    os.pwrite(descriptor, data, 0)
    os.ftruncate(descriptor, len(data))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return soundfile.SoundFile(descriptor, closefd=False)


def _pcm16(data: bytes | memoryview) -> np.ndarray | None:
    """The samples of a 16 kHz mono 16-bit WAV as a view of `data`; None for anything else."""
    if len(data) < 36 or data[:4] != b"RIFF" or data[8:16] != b"WAVEfmt ":
        return None
    size, kind, channels, rate_hz, _, _, bits = struct.unpack_from("<IHHIIHH", data, 16)
    if (kind, channels, rate_hz, bits) != (1, 1, RATE_HZ, 16):
        return None
    place = 20 + size
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        place += 8
        if name == b"data":
            # A header may state more bytes than there are, or none if it was written to a pipe.
            there = len(data) - place
            size = size or (ends.find_end(io.BytesIO(data)).present if there else 0)
            return np.frombuffer(data, "<i2", min(size, there) // 2, place)
        # Chunks are padded to an even length.
        place += size + (size & 1)
    return None
