"""Pass 1 of packing: the length of every file, from its header."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cpcscale import audio, storage
from cpcscale.errors import shown_name
from cpcscale.shards.packing import fetch
from cpcscale.shards.packing.sources import AudioFile, AudioFiles

HEADER_FILES = 64
# Requests for headers at a time: they wait for the store, not for a core.
_AT_ONCE = 8


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


def read_headers(sources: Sequence[AudioFile], limits: audio.SoundLimits | None = None) -> ReadHeaders:
    """Reads the lengths of these files. Files that are not audio are left out; UserError when a store fails."""
    if any(storage.local_path(source.path) is None for source in sources):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            rows = list(pool.map(lambda source: _read_header(source, limits), sources))
    else:
        rows = [_read_header(source, limits) for source in sources]
    samples = np.array([row if isinstance(row, int) else -1 for row in rows], np.int64)
    return ReadHeaders(samples, [row for row in rows if not isinstance(row, int)])


def left_out(source: AudioFile, error: audio.AudioError, piece: str = "") -> dict[str, str]:
    """A row of the quarantine table for a file, or for one `piece` of it."""
    seconds = "" if error.seconds is None else f"{error.seconds:.3f}"
    row = {"path": shown_name(source.name), "piece": piece, "cause": error.cause}
    return {**row, "seconds": seconds, "why": str(error)}


def _read_header(source: AudioFile, limits: audio.SoundLimits | None) -> int | dict[str, str]:
    try:
        # The name is written to tars and tables, which are UTF-8.
        source.name.encode()
        with fetch.opened(source.path, fetch.HEADER_BYTES) as file:
            return audio.read_header(file, limits).length
    except UnicodeEncodeError:
        return left_out(source, audio.AudioError("unreadable", "its name is not UTF-8: rename it"))
    except audio.AudioError as error:
        return left_out(source, error)
