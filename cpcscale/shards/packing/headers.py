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
# Requests for headers at a time: they wait for the store, not for a core.
_AT_ONCE = 8
# A length computed from a bit rate may be wrong by this many frames.
_FRAMES_OFF = 4


@dataclass(frozen=True)
class ReadHeaders:
    """The headers of some files: `samples` int64 [files] at 16 kHz, -1 if left out, and quarantine rows of those."""

    samples: np.ndarray
    left_out: list[dict[str, str]]


class FileChunks(Sequence[list[AudioFile]]):
    """The files in lists of 64, each made when it is accessed."""

    def __init__(self, files: AudioFiles) -> None:
        self._files = files

    def __len__(self) -> int:
        return (len(self._files) + HEADER_FILES - 1) // HEADER_FILES

    def __getitem__(self, at: int) -> list[AudioFile]:  # type: ignore[override]
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self._files[at * HEADER_FILES : (at + 1) * HEADER_FILES]


def read_headers(sources: Sequence[AudioFile]) -> ReadHeaders:
    """Reads the lengths of these files. Files that are not audio are left out; UserError when a store fails."""
    if any(storage.local_path(source.path) is None for source in sources):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            rows = list(pool.map(_read_header, sources))
    else:
        rows = [_read_header(source) for source in sources]
    samples = np.array([row if isinstance(row, int) else -1 for row in rows], np.int64)
    return ReadHeaders(samples, [row for row in rows if not isinstance(row, int)])


def left_out(source: AudioFile, cause: str, why: str, piece: str = "") -> dict[str, str]:
    """A row of the quarantine table for a file, or for one `piece` of it."""
    return {"path": shown_name(source.name), "piece": piece, "cause": cause, "why": why}


def _read_header(source: AudioFile) -> int | dict[str, str]:
    try:
        # The name is written to tars and tables, which are UTF-8.
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
    """Raises AudioError for an MP3 of variable bit rate without a length, for which libsndfile guesses one."""
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
