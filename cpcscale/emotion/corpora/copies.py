"""Of files of one name, one is used; the others must be copies of it.

Laryngographs, other microphones and other releases have the names of the speech. Two files are copies if their bytes
are equal or if they are the same signal, as a WAV and the MP3 made from it are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cpcscale import audio, storage
from cpcscale.emotion.corpora.corpus import DroppedRow
from cpcscale.errors import AudioError, UserError

SECOND_COPY = "a second copy of its file"
_LOSSY = (".mp3", ".ogg", ".oga", ".opus")
# Coders of MP3 shift the signal by up to 2304 samples, and remove what is not heard.
_SHIFT = audio.RATE_HZ // 5
_LEAST_LIKE = 0.9
_AT_ONCE = 8


def by_name(paths: Iterable[str], name: Callable[[str], str]) -> dict[str, list[str]]:
    """The paths of each `name(path)`, in order: lossless formats first."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths, key=lambda path: (path.lower().endswith(_LOSSY), path)):
        found.setdefault(name(path), []).append(path)
    return found


def leave_out(folder: str, groups: Iterable[Sequence[str]]) -> tuple[list[DroppedRow], tuple[str, ...]]:
    """(the copies to drop, a note that names what is used) of groups of paths below `folder`, the one to use first.

    Raises UserError if a file is no copy of the first of its group.
    """
    pairs = [(group[0], other) for group in groups for other in group[1:]]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        differing = [
            (*pair, how)
            for pair, how in zip(pairs, pool.map(lambda pair: _difference(folder, *pair), pairs), strict=True)
            if how
        ]
    if differing:
        first, other, how = differing[0]
        raise UserError(
            f"{storage.join(folder, first)} and {storage.join(folder, other)} have one name and are not the same: "
            f"{how} ({len(differing)} such pairs): move the files that are not meant out of {folder}, or name the "
            "folder of those that are meant as corpus.path"
        )
    notes = tuple(
        f"copies are left out ({len(pairs)}): of {first} and {other}, the first is used" for first, other in pairs[:1]
    )
    return [DroppedRow(other, SECOND_COPY) for _, other in pairs], notes


def _difference(folder: str, *pair: str) -> str:
    """How two files differ, in words; empty if one is a copy of the other."""
    first, other = (storage.read(storage.join(folder, path)) for path in pair)
    if first == other:
        return ""
    if not all(path.lower().endswith(audio.SUFFIXES) for path in pair):
        return f"they have {len(first)} and {len(other)} bytes"
    try:
        return _unlike(audio.decode(first), audio.decode(other))
    except AudioError as error:
        return f"of one, {error}"


def _unlike(first: np.ndarray, other: np.ndarray) -> str:
    """How two signals [S] differ, in words; empty if they are one signal, at most shifted."""
    if abs(len(first) - len(other)) > _SHIFT:
        return f"they last {len(first) / audio.RATE_HZ:.3f} s and {len(other) / audio.RATE_HZ:.3f} s"
    levels = [float(np.sqrt(np.square(wave, dtype=np.float64).sum())) for wave in (first, other)]
    if not all(levels):
        return "one is silent" if any(levels) else ""
    # The circular correlation, with zeros enough that shifts do not come round.
    size = 1 << (max(len(first), len(other)) + _SHIFT).bit_length()
    products = np.fft.irfft(np.fft.rfft(first, size) * np.conj(np.fft.rfft(other, size)), size)
    like = float(np.concatenate([products[: _SHIFT + 1], products[-_SHIFT:]]).max()) / (levels[0] * levels[1])
    return "" if like >= _LEAST_LIKE else f"they correlate by {like:.2f}"
