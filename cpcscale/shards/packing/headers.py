"""Pass 1 of packing: the length of every file, from its header."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpcscale import audio, storage
from cpcscale.shards.packing import fetch, mp3
from cpcscale.shards.packing.sources import AudioFile, AudioFiles, shown_name

HEADER_FILES = 64
# Requests for headers wait for the store, not for a core.
_AT_ONCE = 8
# By how many frames a length that follows from a bit rate may be off.
_FRAMES_OFF = 4


@dataclass(frozen=True)
class ReadHeaders:
    """What pass 1 saw of some files: `samples` int64 [files] at 16 kHz, -1 for one left out, and rows for those."""

    samples: np.ndarray
    left_out: list[dict[str, str]]


class FileChunks(Sequence[list[AudioFile]]):
    """The files in lists of 64, each made when it is asked for."""

    def __init__(self, files: AudioFiles) -> None:
        self._files = files

    def __len__(self) -> int:
        return (len(self._files) + HEADER_FILES - 1) // HEADER_FILES

    def __getitem__(self, at: int) -> list[AudioFile]:  # type: ignore[override]
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self._files[at * HEADER_FILES : (at + 1) * HEADER_FILES]


def read_headers(sources: Sequence[AudioFile]) -> ReadHeaders:
    """The lengths of these files. Raises UserError when a store fails; a file that is no audio is left out."""
    if any(storage.local_path(source.path) is None for source in sources):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            rows = list(pool.map(_probe, sources))
    else:
        rows = [_probe(source) for source in sources]
    samples = np.array([row if isinstance(row, int) else -1 for row in rows], np.int64)
    return ReadHeaders(samples, [row for row in rows if not isinstance(row, int)])


def left_out(source: AudioFile, cause: str, why: str, piece: str = "") -> dict[str, str]:
    """A row of the quarantine table: for a file, or for one `piece` of a recording."""
    return {"path": shown_name(source.name), "piece": piece, "cause": cause, "why": why}


def _probe(source: AudioFile) -> int | dict[str, str]:
    try:
        # The name goes into tars and tables, all of them UTF-8.
        source.name.encode()
        with fetch.opened(source.path, fetch.HEADER_BYTES) as file:
            info = audio.read_header(file)
            if source.name.lower().endswith(".mp3"):
                _check_mp3(file, info)
        return info.length
    except UnicodeEncodeError:
        return left_out(source, "unreadable", "its name is not UTF-8: rename it")
    except audio.AudioError as error:
        return left_out(source, error.cause, str(error))


def _check_mp3(source: audio.Source, info: audio.AudioInfo) -> None:
    """Refuses an MP3 of changing bit rate that has no length: libsndfile guesses one, and reads no further."""
    if isinstance(source, str):
        with Path(source).open("rb") as file:
            frames = mp3.count(file)
    else:
        assert not isinstance(source, bytes)
        frames = mp3.count(source)
    if frames is not None and abs(frames[0] - info.samples) > _FRAMES_OFF * frames[1]:
        raise audio.AudioError(
            "unreadable",
            f"an MP3 without a length in its header, of {info.duration_s:.1f} s by its bit rate and "
            f"{frames[0] / info.rate_hz:.1f} s by its frames: write it again, as `ffmpeg -c copy` does",
        )
