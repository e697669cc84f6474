"""The audio that people give to a recogniser or an encoder: a file, or an array, through one door."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from cpcscale import audio, storage
from cpcscale.emotion.audio.labelled_file import LEAST_S
from cpcscale.errors import AudioError, UserError

# Audio that is clipped or has an offset has frames and values, as it has a flag; silence has none.
_SOUND = audio.SoundLimits(clipped=1.0, offset=1.0)


def read_wave(source: str | Path | bytes | np.ndarray, rate: int = 0) -> np.ndarray:
    """int16 [S] at 16 kHz of a file (path, s3:// URL or its bytes), or of an array [S] or [S, channels] at `rate` Hz.

    Raises UserError for a file that is not there and an array without a rate, AudioError for what is no sound.
    """
    name, data = given_audio(source, rate)
    wave_S = audio.decode_checked(storage.read(name) if data is None else data)[1]
    seconds = len(wave_S) / audio.RATE_HZ
    if seconds < LEAST_S:
        raise AudioError("short", f"it lasts {seconds:.3f} s, too short for speech (at least {LEAST_S} s)", seconds)
    return audio.check_sound(wave_S, _SOUND)[0]


def given_audio(source: str | Path | bytes | np.ndarray, rate: int = 0) -> tuple[str, bytes | None]:
    """(the name of a file, None), or ("", the bytes of one). Raises UserError for anything else, such as a list."""
    if isinstance(source, np.ndarray):
        return "", array_as_file(source, rate)
    if isinstance(source, bytes):
        return "", source
    if isinstance(source, str | Path):
        return str(source), None
    if isinstance(source, list | tuple):
        raise UserError(
            f"a {type(source).__name__} is no audio: pass samples as a NumPy array with their rate, or a list of paths "
            "to predict_many"
        )
    raise UserError(f"a {type(source).__name__} is no audio: pass a path, the bytes of a file, or a NumPy array")


def array_as_file(wave: np.ndarray, rate: int) -> bytes:
    """An array as a WAV file. Raises UserError for what is no audio."""
    if rate <= 0:
        raise UserError(f"rate={rate}: an array has no sampling rate of its own: pass it, as rate=16000")
    if wave.ndim not in (1, 2) or not (np.issubdtype(wave.dtype, np.floating) or wave.dtype == np.int16):
        raise UserError(
            f"an array of shape {wave.shape} and type {wave.dtype} is no audio: pass float or int16 values [samples] "
            "or [samples, channels]"
        )
    out, kind = io.BytesIO(), "PCM_16" if wave.dtype == np.int16 else "FLOAT"
    try:
        soundfile.write(out, wave if kind == "PCM_16" else wave.astype(np.float32), int(rate), kind, format="WAV")
    except (soundfile.SoundFileError, OverflowError):
        raise UserError(
            f"an array of shape {wave.shape} at {rate} Hz is no audio: pass [samples] or [samples, channels], of at "
            "most 1,024 channels, and the rate in Hz"
        ) from None
    return out.getvalue()
