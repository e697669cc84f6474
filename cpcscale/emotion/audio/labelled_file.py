"""One audio file of a corpus: the waveforms of its utterances, or why they cannot be used.

An utterance has the sha256 of its file as its digest; a part of a file that of the file's digest and its place there.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from cpcscale import audio, storage
from cpcscale.emotion.corpora.corpus import NO_AUDIO, DroppedRow, Utterance

LEAST_S = 0.1
# The reasons in `Corpus.dropped`, by cause.
_WORDS = {
    "missing": NO_AUDIO,
    "empty": "empty audio file",
    "unreadable": "audio that does not decode",
    "short": f"under {LEAST_S} s",
    "outside": "a part behind the end of its file",
    "cut": "audio that was cut off",
    "longer": "audio longer than its header states",
    "rate": "audio of no speech rate",
    "silent": "audio of zeros",
    "quiet": "audio below one step of 16 bits",
    "clipped": "audio at full scale",
    "constant": "audio of a constant",
    "cancelled": "channels that cancel each other",
    "pointer": "a pointer in place of audio",
}


@dataclass(frozen=True)
class UnusableAudio:
    """An utterance whose audio cannot be used; `cause` is a key of `_WORDS`, `why` is a sentence.

    `seconds` is how much audio of the file is lost with it, where the audio itself tells.
    """

    key: str
    path: str
    cause: str
    why: str
    seconds: float | None = None

    @property
    def dropped(self) -> DroppedRow:
        """The entry for `Corpus.dropped`."""
        return DroppedRow(self.key, _WORDS[self.cause])


def read_file(utterance: Utterance, known: Container[str] = ()) -> tuple[str, np.ndarray | UnusableAudio | None]:
    """(digest, its waveform int16 [S] or why it is unusable); None for the waveform if `known` has it."""
    return read_parts([utterance], known)[0]


def read_parts(
    parts: Sequence[Utterance], known: Container[str] = ()
) -> list[tuple[str, np.ndarray | UnusableAudio | None]]:
    """What `read_file` returns, for several utterances of one file, which is read and decoded once."""

    def unusable(
        cause: str, why: str, seconds: float | None = None
    ) -> list[tuple[str, np.ndarray | UnusableAudio | None]]:
        bad = [UnusableAudio(one.key, one.path, cause, why, seconds) for one in parts]
        return list(zip(digests, bad, strict=True))

    digests = [""] * len(parts)
    try:
        data = storage.read(parts[0].path)
    except storage.NotFoundError as error:
        return unusable("missing", str(error))
    file = sha256(data).hexdigest()
    digests = [sha256(f"{file} {one.segment}".encode()).hexdigest() if one.segment else file for one in parts]
    if all(digest in known for digest in digests):
        return [(digest, None) for digest in digests]
    try:
        decoded = audio.decode_checked(data)[1]
    except audio.AudioError as error:
        return unusable(error.cause, str(error), error.seconds)
    return [(digest, _part(one, decoded)) for one, digest in zip(parts, digests, strict=True)]


def part_bounds(utterance: Utterance, samples: int) -> tuple[int, int] | UnusableAudio:
    """[start, stop) of an utterance in a file of this length, in samples."""
    start, stop = 0, samples
    if utterance.segment:
        first, last = utterance.segment
        start, stop = round(first * audio.RATE_HZ), samples if math.isinf(last) else round(last * audio.RATE_HZ)
        # Annotators round.
        if start >= samples or stop > samples + LEAST_S * audio.RATE_HZ:
            to = "its end" if math.isinf(last) else f"{last:g} s"
            why = f"it is {first:g} s to {to} of a file of {samples / audio.RATE_HZ:.3f} s"
            return UnusableAudio(utterance.key, utterance.path, "outside", why)
        stop = min(stop, samples)
    return (start, stop) if stop - start >= LEAST_S * audio.RATE_HZ else _short(utterance, stop - start)


def _part(utterance: Utterance, decoded: np.ndarray) -> np.ndarray | UnusableAudio:
    """The int16 samples of an utterance of a decoded file, or why they are unusable."""
    bounds = part_bounds(utterance, len(decoded))
    if isinstance(bounds, UnusableAudio):
        return bounds
    try:
        return audio.check_sound(decoded[slice(*bounds)], audio.SoundLimits())[0]
    except audio.AudioError as error:
        return UnusableAudio(utterance.key, utterance.path, error.cause, str(error), error.seconds)


def _short(utterance: Utterance, samples: int) -> UnusableAudio:
    why = f"it lasts {samples / audio.RATE_HZ:.3f} s, too short for speech (at least {LEAST_S} s)"
    return UnusableAudio(utterance.key, utterance.path, "short", why)
