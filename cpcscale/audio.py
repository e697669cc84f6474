"""Audio bytes to mono samples at 16 kHz, whole or a slice, and back; probing without decoding.

Samples are float32 in [-1, 1) or int16. The one rounding between them, used everywhere: int16 = clip(rint(x * 32768)),
x = int16 / 32768. A 16-bit source survives it bit for bit.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from cpcscale.errors import UserError

RATE_HZ = 16_000
SUFFIXES = (".wav", ".flac", ".opus", ".ogg", ".mp3", ".aif", ".aiff", ".au", ".sph")
_FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
CODECS = tuple(_FORMATS)
# A damaged header, or one of a FLAC written to a pipe, claims years; libsndfile believes it.
_LONGEST_S = 86_400
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class AudioError(UserError):
    """Bytes that cannot be used as speech; `cause` is one word for the quarantine table."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str]]:
        # Exceptions unpickle by their args alone, and this one takes two; it crosses process borders.
        return AudioError, (self.cause, str(self))


@dataclass(frozen=True)
class AudioInfo:
    """What the header says: `samples` a channel at the file's own `rate_hz`."""

    samples: int
    rate_hz: int
    channels: int

    @property
    def duration_s(self) -> float:
        return self.samples / self.rate_hz


def probe(source: bytes | str) -> AudioInfo:
    """The header of a file (path or bytes), nothing decoded. Raises AudioError `unreadable` or `empty`."""
    try:
        with soundfile.SoundFile(_opened(source)) as file:
            return _header(file, source)
    except (soundfile.LibsndfileError, OSError, UnicodeEncodeError) as error:
        raise AudioError("unreadable", f"{_name(source)} is not audio that libsndfile reads: {_why(error)}") from None


def decode(source: bytes | str) -> np.ndarray:
    """The whole signal as float32 [S], mono at 16 kHz: channels averaged, resampled by soxr's HQ preset.

    Raises AudioError `unreadable` or `empty`.
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


def decode_slice(data: bytes, start: int, count: int) -> np.ndarray:
    """Samples [start, start + count) of a 16 kHz mono member as int16 [count].

    Raises AudioError `unreadable` when the member does not decode, is not 16 kHz mono, or ends before the slice does.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if (file.samplerate, file.channels) != (RATE_HZ, 1):
                raise AudioError("unreadable", f"a member is {file.samplerate} Hz x {file.channels}, not 16 kHz mono")
            file.seek(start)
            exact = file.subtype == "PCM_16"
            wave = file.read(count, dtype="int16" if exact else "float32")
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError("unreadable", f"a member cannot be decoded: {_why(error)}") from None
    if len(wave) != count:
        raise AudioError("unreadable", f"a member ends at sample {start + len(wave)}, before {start + count}")
    return wave if exact else to_int16(wave)


def encode(wave: np.ndarray, codec: str) -> bytes:
    """The int16 signal [S] at 16 kHz as one file of `codec` (wav, flac, opus); the same signal gives the same bytes."""
    form, subtype = _FORMATS[codec]
    out = io.BytesIO()
    soundfile.write(out, wave, RATE_HZ, format=form, subtype=subtype)
    return _with_serial_zero(out.getvalue()) if form == "OGG" else out.getvalue()


def to_int16(wave: np.ndarray) -> np.ndarray:
    """float [-1, 1) to int16 by the module's one rounding, values outside clipped."""
    return np.clip(np.rint(wave * np.float32(32768)), -32768, 32767).astype(np.int16)


def _with_serial_zero(ogg: bytes) -> bytes:
    """An Ogg file with the stream's random serial number made 0 and each page's checksum set anew (RFC 3533)."""
    pages, start = bytearray(ogg), 0
    while start < len(pages):
        lengths = pages[start + 27 : start + 27 + pages[start + 26]]
        stop = start + 27 + len(lengths) + sum(lengths)
        pages[start + 14 : start + 18] = bytes(4)
        pages[start + 22 : start + 26] = bytes(4)
        # Ogg's CRC is zlib's with every byte's bits, and the result's, the other way round, and no inversions.
        mirrored = ~zlib.crc32(pages[start:stop].translate(_MIRRORED), 0xFFFFFFFF) & 0xFFFFFFFF
        pages[start + 22 : start + 26] = mirrored.to_bytes(4, "big").translate(_MIRRORED)
        start = stop
    return bytes(pages)


def _header(file: soundfile.SoundFile, source: bytes | str) -> AudioInfo:
    info = AudioInfo(file.frames, file.samplerate, file.channels)
    if info.samples <= 0:
        raise AudioError("empty", f"{_name(source)} holds no samples")
    if info.duration_s > _LONGEST_S:
        raise AudioError(
            "unreadable", f"{_name(source)} has no length in its header, or one past a day: write it again"
        )
    return info


def _opened(source: bytes | str) -> io.BytesIO | str:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _name(source: bytes | str) -> str:
    # A name that is not UTF-8 must not break the message, or the table that the message goes into.
    return f"{len(source)} bytes" if isinstance(source, bytes) else source.encode(errors="backslashreplace").decode()


def _why(error: Exception) -> str:
    # libsndfile's own words, without the address of the buffer that it read.
    return error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
