"""What an audio file is, how long it is, and its samples."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import soundfile
import soxr

from cpcscale.audio import ends, mp3, not_audio
from cpcscale.audio.encoding import RATE_HZ
from cpcscale.audio.sound import SoundLimits
from cpcscale.errors import AudioError, UserError, shown_name

SUFFIXES = (
    *(".wav", ".flac", ".opus", ".ogg", ".mp3", ".aif", ".aiff", ".au", ".sph"),
    *(".wave", ".rf64", ".w64", ".oga", ".aifc", ".snd", ".caf"),
)
# A damaged header, or that of a FLAC written to a pipe, may state years; libsndfile does not check it.
_LONGEST_S = 86_400
# A decoder of MP3 may leave out so many frames at both ends: its own delay, and the encoder's.
_FRAMES_OFF = 4
WRITE_AGAIN = "write it again, as `ffmpeg -i OLD NEW` does"
# Larger samples, of a damaged file of floats, overflow when they are scaled or averaged.
_LARGEST = 1e30
# The power of an average of channels, as a share of what it is for unrelated ones. Below, the channels cancel.
_LEAST_KEPT = 0.01
# Blocks are judged by it from so many seconds on, or at the end: a jingle may have wide stereo.
_JUDGED_S = 10
# Frames to read at a time where a file is not in memory as a whole.
_BLOCK_FRAMES = 65_536


# A local path, the bytes of a file, or an open file that can seek.
Source = bytes | str | io.RawIOBase


class _Sequential(soundfile.SoundFile):
    """A file that is read in order: soundfile seeks after each read, and after a seek Opus decodes other samples."""

    def seekable(self) -> bool:
        return False


@dataclass(frozen=True)
class AudioInfo:
    """The header of a file: `samples` of each channel, at the file's own `rate_hz`; `form` as libsndfile names it."""

    samples: int
    rate_hz: int
    channels: int
    form: str = field(default="", compare=False)

    @property
    def duration_s(self) -> float:
        return self.samples / self.rate_hz

    @property
    def length(self) -> int:
        """How many samples `decode` returns, if the header is right; soxr rounds halves up."""
        return (2 * self.samples * RATE_HZ + self.rate_hz) // (2 * self.rate_hz)


def read_header(source: Source, limits: SoundLimits | None = None) -> AudioInfo:
    """The header of a file, checked against what the file holds where that needs no decoding.

    Raises AudioError with cause `unreadable`, `empty`, `pointer` (a pointer of git-lfs or git-annex, or a link to
    nothing), `rate`, `cut` (its audio ends
    before the stated end) or `longer` (there is audio behind the stated end). For FLAC, Ogg and MP3 with a stated
    length, `check_stream` finds what only reading all bytes can show.
    """
    with _opened(source) as file:
        info = _header(file, source)
    lowest, highest = (limits or SoundLimits()).rate_hz
    if not lowest <= info.rate_hz <= highest:
        why = f"{_name(source)} states a rate of {info.rate_hz} Hz, not {lowest} to {highest} Hz: correct its header"
        raise AudioError("rate", why)
    with _raw(source) as raw:
        if info.form not in ("MP3", "FLAC") and raw.read(3) == b"ID3":
            # libsndfile reads on behind the tag, but loses as many bytes at the end.
            raise AudioError("unreadable", f"{_name(source)} has an ID3 tag before its header: {WRITE_AGAIN}")
        if info.form == "MP3":
            return _by_frames(source, info, mp3.read_frames(raw, trust=True))
        end = ends.find_end(raw)
        if end.missing and end.present:
            stated_s = info.duration_s * (1 + end.missing / end.present)
            why = f"{_name(source)} is cut off: its header states {stated_s:.3f} s, {info.duration_s:.3f} s are there"
            raise AudioError("cut", f"{why}; {WRITE_AGAIN}", info.duration_s)
        if info.form == "OGG" and ends.is_ogg_cut(raw):
            raise AudioError(
                "cut", f"{_name(source)} is cut off after {info.duration_s:.3f} s; {WRITE_AGAIN}", info.duration_s
            )
        if end.following:
            why = f"{_name(source)} goes on for {end.following} bytes behind the end that its header states"
            raise AudioError("longer", f"{why}: {WRITE_AGAIN}", info.duration_s)
    return info


def check_stream(source: Source, info: AudioInfo) -> None:
    """Reads all bytes of a FLAC, Ogg or MP3 file for audio that its header `info` does not state, or that is missing.

    Raises AudioError with cause `longer` or `cut`.
    """
    with _raw(source) as raw:
        behind = ends.find_stream(raw) if info.form in ("FLAC", "OGG") else ""
        open_end = ends.find_open_end(raw) if info.form == "OGG" else None
        frames = mp3.read_frames(raw) if info.form == "MP3" else None
    if behind:
        raise AudioError("longer", f"{_name(source)} holds more than its header states: {behind}; {WRITE_AGAIN}")
    if open_end:
        cause, why = open_end
        raise AudioError(cause, f"{_name(source)} has no certain end: {why}; {WRITE_AGAIN}", info.duration_s)
    if frames and frames.stated is not None:
        stated_s, there_s = (count * frames.samples / info.rate_hz for count in (frames.stated, frames.count))
        # Some encoders count the frame that states the number.
        if frames.count > frames.stated + 1:
            why = f"{_name(source)} states {stated_s:.3f} s and its frames last {there_s:.3f} s"
            raise AudioError("longer", f"{why}: {WRITE_AGAIN}", there_s)
        if frames.count < frames.stated - 1 or frames.cut:
            why = f"{_name(source)} is cut off: its header states {stated_s:.3f} s and {there_s:.3f} s are there"
            raise AudioError("cut", f"{why}; {WRITE_AGAIN}", there_s)


def decode(source: bytes | str) -> np.ndarray:
    """The whole signal as float32 [S], mono at 16 kHz: channels are averaged, then resampled by soxr's HQ preset.

    Raises AudioError with cause `unreadable` or `empty`.
    """
    return _decoded(source)[0]


def decode_checked(source: bytes | str, limits: SoundLimits | None = None) -> tuple[AudioInfo, np.ndarray]:
    """(header, whole signal as `decode` gives it) of a file that is what it says it is.

    Its slices can be decoded as training does it, up to its end. Raises AudioError with the causes of `read_header`,
    or `cancelled`: its channels cancel each other in their average.
    """
    info = read_header(source, limits)
    check_stream(source, info)
    wave, powers = _decoded(source)
    _refuse_cancelled(source, info, powers)
    if len(wave) + slack_samples(info) < info.length:
        stated_s, there_s = info.length / RATE_HZ, len(wave) / RATE_HZ
        why = f"{_name(source)} states {stated_s:.3f} s and {there_s:.3f} s decode"
        raise AudioError("cut", f"{why}; {WRITE_AGAIN}", stated_s)
    return info, wave


def slack_samples(info: AudioInfo) -> int:
    """How many samples at 16 kHz may be fewer than stated without a loss: the delays of coders of MP3."""
    return _FRAMES_OFF * 1152 * RATE_HZ // info.rate_hz if info.form == "MP3" else 1


def decode_blocks(source: Source) -> Iterator[np.ndarray]:
    """The samples that `decode` returns, as consecutive float32 blocks; takes a few MB for a file of any length.

    Raises AudioError with cause `unreadable`, `empty` or `cancelled` (see `decode_checked`), after the blocks that
    could be decoded.
    """
    decoded = 0
    powers = np.zeros(2)
    with _opened(source, _Sequential) as file:
        info = _header(file, source)
        rate_hz = info.rate_hz
        resampler = None if rate_hz == RATE_HZ else soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32")
        # Not past the stated frames: libsndfile takes a tag behind a FLAC for damaged audio.
        while count := min(_BLOCK_FRAMES, info.samples - decoded):
            wave = file.read(count, dtype="float32", always_2d=True)
            if not len(wave):
                break
            decoded += len(wave)
            mono = _average(source, wave)
            powers += _powers(wave, mono)
            if decoded == info.samples or decoded > _JUDGED_S * rate_hz:
                _refuse_cancelled(source, info, powers)
            yield resampler.resample_chunk(mono) if resampler else mono
        if resampler and decoded:
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    if not decoded:
        raise AudioError("empty", f"{_name(source)} holds no samples")


def _decoded(source: bytes | str) -> tuple[np.ndarray, np.ndarray]:
    """(what `decode` returns, the `_powers` of the file)."""
    with _opened(source) as file:
        rate_hz = _header(file, source).rate_hz
        wave = file.read(-1 if file.seekable() else file.frames, dtype="float32", always_2d=True)
    if not len(wave):
        raise AudioError("empty", f"{_name(source)} holds no samples")
    mono = _average(source, wave)
    return mono if rate_hz == RATE_HZ else soxr.resample(mono, rate_hz, RATE_HZ), _powers(wave, mono)


def _average(source: Source, wave: np.ndarray) -> np.ndarray:
    """The average of the channels of float32 [S, channels], [S]."""
    if not np.abs(wave).max() < _LARGEST:
        raise AudioError("unreadable", f"{_name(source)} holds samples that are no numbers, or too large")
    return wave.mean(axis=1) if wave.shape[1] > 1 else wave[:, 0]


def _powers(wave: np.ndarray, mono: np.ndarray) -> np.ndarray:
    """[energy of the average `mono`, what it is for channels `wave` that are unrelated]; zeros for one channel."""
    channels = wave.shape[1]
    energies = (channels * np.vdot(mono, mono), np.vdot(wave, wave) / channels) if channels > 1 else (0.0, 0.0)
    return np.array(energies, np.float64)


def _refuse_cancelled(source: Source, info: AudioInfo, powers: np.ndarray) -> None:
    if powers[0] < _LEAST_KEPT * powers[1]:
        why = f"{_name(source)} has channels that cancel each other: their average, which training would take, is "
        way_out = "take one of them, as `ffmpeg -i OLD -af pan=mono|c0=c0 NEW` does"
        raise AudioError("cancelled", f"{why}next to silence; {way_out}", info.duration_s)


def _handle(source: Source) -> int | io.IOBase:
    """The source as libsndfile takes it: as a descriptor if possible.

    Given a path, libsndfile goes by the suffix where it does not know the content. It takes the interpreter's lock at
    each read of a Python file, and so waits for other threads; it reads a descriptor without the lock.
    """
    if isinstance(source, str):
        return os.open(source, os.O_RDONLY)
    if not isinstance(source, bytes):
        return source
    if not hasattr(os, "memfd_create"):
        return io.BytesIO(source)
    descriptor = os.memfd_create("audio")
    os.pwrite(descriptor, source, 0)
    return descriptor


def _by_frames(source: Source, info: AudioInfo, frames: mp3.Frames) -> AudioInfo:
    """The header of an MP3, of which libsndfile guesses the length by its bit rate if it states none."""
    if frames.stated is not None:
        return info
    true = frames.count * frames.samples
    there_s = true / info.rate_hz
    if frames.cut:
        raise AudioError("cut", f"{_name(source)} is cut off inside its last frame, after {there_s:.3f} s", there_s)
    if true > info.samples + _FRAMES_OFF * frames.samples or not true:
        raise AudioError(
            "longer",
            f"{_name(source)} is an MP3 without a length in its header, of {info.duration_s:.1f} s by its bit rate and "
            f"{there_s:.1f} s by its frames: write it again, as `ffmpeg -c copy` does",
            there_s,
        )
    return replace(info, samples=min(info.samples, true))


def _header(file: soundfile.SoundFile, source: Source) -> AudioInfo:
    info = AudioInfo(file.frames, file.samplerate, file.channels, file.format)
    if info.samples <= 0:
        raise AudioError("empty", f"{_name(source)} holds no samples")
    if info.duration_s > _LONGEST_S:
        raise AudioError(
            "unreadable", f"{_name(source)} states no length in its header, or more than a day: {WRITE_AGAIN}"
        )
    return info


@contextlib.contextmanager
def _opened(source: Source, kind: type[soundfile.SoundFile] = soundfile.SoundFile) -> Iterator[soundfile.SoundFile]:
    """The source as an open file. Raises AudioError where it, or what is done with it, fails."""
    try:
        file = kind(_handle(source))
        if not file.frames and (whole := _with_length(source)):
            file.close()
            file = kind(_handle(whole))
        with file:
            yield file
    except (soundfile.LibsndfileError, OSError, UnicodeEncodeError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        with _raw(source) as raw:
            head = raw.read(not_audio.HEAD_BYTES) or b""
        if not head:
            raise AudioError("empty", f"{_name(source)} has no bytes") from None
        if other := not_audio.what_else(head):
            raise AudioError(other[0], f"{_name(source)} is {other[1]}") from None
        raise AudioError(
            "unreadable",
            f"{_name(source)} cannot be decoded by libsndfile ({why_failed(error).rstrip('.')}); if a player opens it, "
            f"{WRITE_AGAIN}",
        ) from None


def _with_length(source: Source) -> bytes:
    """The bytes of a WAV or AU that was written to a pipe and states 0 bytes of audio, with the largest number there.

    libsndfile then reads it to its end. Empty for any other file.
    """
    with _raw(source) as raw:
        at = ends.find_end(raw).header
        if at is None:
            return b""
        raw.seek(0)
        data = bytearray(raw.read(-1) or b"")
    data[at : at + 4] = b"\xff\xff\xff\xff"
    return bytes(data)


@contextlib.contextmanager
def _raw(source: Source) -> Iterator[io.RawIOBase | io.BufferedIOBase]:
    """The bytes of the source as an open file, at its start."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, str):
        try:
            with Path(source).open("rb") as file:
                yield file
        except OSError as error:
            if isinstance(error, FileNotFoundError) and Path(source).is_symlink():
                why = "is a link to a file that is not there: fetch it, as `git annex get` and `dvc pull` do"
                raise AudioError("pointer", f"{_name(source)} {why}") from None
            raise AudioError("unreadable", f"{_name(source)} cannot be opened: {error.strerror}") from None
    else:
        source.seek(0)
        yield source
        source.seek(0)


def _name(source: Source) -> str:
    if isinstance(source, bytes):
        return "the file"
    name = source if isinstance(source, str) else str(getattr(source, "name", "a file"))
    # A name that is not UTF-8 must not break the message, or the quarantine table that holds the message.
    return shown_name(name)


def why_failed(error: Exception) -> str:
    # libsndfile's message, without the address of the buffer that it read.
    return error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
