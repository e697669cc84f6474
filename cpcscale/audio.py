"""Decodes audio to mono samples at 16 kHz, whole or a slice; encodes it; reads headers without decoding.

Samples are float32 in [-1, 1) or int16. Everywhere, int16 = clip(rint(x * 32768)) and x = int16 / 32768, so a 16-bit
source comes back bit for bit.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from cpcscale.errors import UserError

RATE_HZ = 16_000
SUFFIXES = (".wav", ".flac", ".opus", ".ogg", ".mp3", ".aif", ".aiff", ".au", ".sph")
_FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
CODECS = tuple(_FORMATS)
# A damaged header, or that of a FLAC written to a pipe, may state years; libsndfile does not check it.
_LONGEST_S = 86_400
# Frames to read at a time where a file is not in memory as a whole.
_BLOCK_FRAMES = 65_536
_thread = threading.local()
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


# A local path, the bytes of a file, or an open file that can seek.
Source = bytes | str | io.RawIOBase


class AudioError(UserError):
    """Raised for bytes that cannot be used as speech; `cause` is one word for the quarantine table."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str]]:
        # An exception is unpickled from its args alone, and this one takes two. Workers send it to their driver.
        return AudioError, (self.cause, str(self))


class _Sequential(soundfile.SoundFile):
    """A file that is read in order: soundfile seeks after each read, and after a seek Opus decodes other samples."""

    def seekable(self) -> bool:
        return False


@dataclass(frozen=True)
class AudioInfo:
    """The header of a file: `samples` of each channel, at the file's own `rate_hz`."""

    samples: int
    rate_hz: int
    channels: int

    @property
    def duration_s(self) -> float:
        return self.samples / self.rate_hz

    @property
    def length(self) -> int:
        """How many samples `decode` returns, if the header is right; soxr rounds halves up."""
        return (2 * self.samples * RATE_HZ + self.rate_hz) // (2 * self.rate_hz)


def read_header(source: Source) -> AudioInfo:
    """The header of a file; nothing is decoded. Raises AudioError with cause `unreadable` or `empty`."""
    try:
        with soundfile.SoundFile(_opened(source)) as file:
            return _header(file, source)
    except (soundfile.LibsndfileError, OSError, UnicodeEncodeError) as error:
        raise AudioError("unreadable", f"{_name(source)} is not audio that libsndfile reads: {_why(error)}") from None


def decode(source: bytes | str) -> np.ndarray:
    """The whole signal as float32 [S], mono at 16 kHz: channels are averaged, then resampled by soxr's HQ preset.

    Raises AudioError with cause `unreadable` or `empty`.
    """
    try:
        with soundfile.SoundFile(_opened(source)) as file:
            rate_hz = _header(file, source).rate_hz
            wave = file.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, UnicodeEncodeError) as error:
        raise AudioError("unreadable", f"{_name(source)} cannot be decoded: {_why(error)}") from None
    if not len(wave):
        raise AudioError("empty", f"{_name(source)} holds no samples")
    if not np.isfinite(wave).all():
        raise AudioError("unreadable", f"{_name(source)} holds samples that are not numbers")
    mono = wave.mean(axis=1) if wave.shape[1] > 1 else wave[:, 0]
    return mono if rate_hz == RATE_HZ else soxr.resample(mono, rate_hz, RATE_HZ)


def decode_blocks(source: Source) -> Iterator[np.ndarray]:
    """The samples that `decode` returns, as consecutive float32 blocks; takes a few MB for a file of any length.

    Raises AudioError with cause `unreadable` or `empty`, after the blocks that could be decoded.
    """
    decoded = False
    try:
        with _Sequential(_opened(source)) as file:
            rate_hz = _header(file, source).rate_hz
            resampler = None if rate_hz == RATE_HZ else soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32")
            while len(wave := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                decoded = True
                if not np.isfinite(wave).all():
                    raise AudioError("unreadable", f"{_name(source)} holds samples that are not numbers")
                mono = wave.mean(axis=1) if wave.shape[1] > 1 else wave[:, 0]
                yield resampler.resample_chunk(mono) if resampler else mono
            if resampler and decoded:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    except (soundfile.LibsndfileError, OSError, UnicodeEncodeError) as error:
        raise AudioError("unreadable", f"{_name(source)} cannot be decoded: {_why(error)}") from None
    if not decoded:
        raise AudioError("empty", f"{_name(source)} holds no samples")


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
                if (file.samplerate, file.channels) != (RATE_HZ, 1):
                    part = to_int16(decode(bytes(data)))[start : start + count]
                else:
                    # A slice may start past the end; libsndfile refuses to seek there.
                    file.seek(min(start, file.frames))
                    exact = file.subtype == "PCM_16"
                    part = file.read(count, "int16", out=wave) if exact else to_int16(file.read(count, "float32"))
        except (soundfile.LibsndfileError, OSError) as error:
            raise AudioError("unreadable", f"a member cannot be decoded: {_why(error)}") from None
    if len(part) != count:
        raise AudioError("cut", f"a member ends at sample {start + len(part)}, before {start + count}")
    if part is not wave:
        wave[:] = part
    return wave


def encode(wave: np.ndarray, codec: str) -> bytes:
    """The int16 signal [S] at 16 kHz as the bytes of a file; `codec` is wav, flac or opus. Same signal, same bytes.

    >>> decode(encode(np.array([0, 16384], np.int16), "flac")).tolist()
    [0.0, 0.5]
    """
    form, subtype = _FORMATS[codec]
    out = io.BytesIO()
    soundfile.write(out, wave, RATE_HZ, format=form, subtype=subtype)
    return _with_serial_zero(out.getvalue()) if form == "OGG" else out.getvalue()


def to_int16(wave: np.ndarray) -> np.ndarray:
    """float samples as int16: clip(rint(wave * 32768))."""
    return np.clip(np.rint(wave * np.float32(32768)), -32768, 32767).astype(np.int16)


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


def _in_memory(data: bytes | memoryview) -> soundfile.SoundFile:
    """The bytes as an open file that libsndfile reads without Python.

    It takes the interpreter's lock at each read of a Python file object, and so waits for other threads; it reads a
    file descriptor without the lock. Each thread keeps one anonymous file for this.
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
            # A header may state more bytes than there are.
            return np.frombuffer(data, "<i2", min(size, len(data) - place) // 2, place)
        # Chunks are padded to an even length.
        place += size + (size & 1)
    return None


def _header(file: soundfile.SoundFile, source: Source) -> AudioInfo:
    info = AudioInfo(file.frames, file.samplerate, file.channels)
    if info.samples <= 0:
        raise AudioError("empty", f"{_name(source)} holds no samples")
    if info.duration_s > _LONGEST_S:
        raise AudioError(
            "unreadable", f"{_name(source)} states no length in its header, or more than a day: write it again"
        )
    return info


def _opened(source: Source) -> io.IOBase | str:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _name(source: Source) -> str:
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    name = source if isinstance(source, str) else str(getattr(source, "name", "a file"))
    # A name that is not UTF-8 must not break the message, or the quarantine table that holds the message.
    return name.encode(errors="backslashreplace").decode()


def _why(error: Exception) -> str:
    # libsndfile's message, without the address of the buffer that it read.
    return error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
