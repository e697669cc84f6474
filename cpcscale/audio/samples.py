"""The samples of a file of any length, of which parts are read: long audio never lies in memory as a whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Protocol

import numpy as np

from cpcscale.audio.encoding import RATE_HZ
from cpcscale.audio.files import WRITE_AGAIN, Source, check_stream, decode_blocks, read_header, slack_samples
from cpcscale.audio.sound import to_int16
from cpcscale.errors import AudioError, UserError

# Longer audio waits in a temporary file.
_IN_MEMORY = 300 * RATE_HZ
# Samples that are read at a time.
_BLOCK = 60 * RATE_HZ


class Sliced(Protocol):
    """A waveform [S] of which parts are read: an array, or one that does not lie in memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Samples:
    """int16 samples at 16 kHz mono: `samples[start:stop]` is an array of them.

    `peak` is the largest before it became int16, of a whole file; of a part it is not known, and 0.
    """

    def __init__(self, read: Callable[[int, int], np.ndarray], start: int, stop: int, peak: float = 0.0) -> None:
        """`read` gives samples [start, stop) of the whole, of which these are a part."""
        self.peak = peak
        self._read, self._start, self._stop = read, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        return self._read(self._start + start, self._start + max(start, stop))

    def part(self, start: int, stop: int) -> Samples:
        """Those from `start` to before `stop`."""
        peak = self.peak if (start, stop) == (0, len(self)) else 0.0
        return Samples(self._read, self._start + start, self._start + stop, peak)

    def blocks(self) -> Iterator[np.ndarray]:
        """All samples, a minute or less at a time."""
        for start in range(0, len(self), _BLOCK):
            yield self[start : start + _BLOCK]


@contextlib.contextmanager
def open_samples(source: Source) -> Iterator[Samples]:
    """The samples of a file that is what it says it is, for the block: those of `decode_checked` as int16.

    More than five minutes wait in an unnamed temporary file, 115 MB an hour, so that a file of any length takes a few
    MB of memory. Raises AudioError with the causes of `decode_checked`, and UserError if the disk is full.
    """
    info = read_header(source)
    check_stream(source, info)
    with contextlib.ExitStack() as stack:
        kept: list[np.ndarray] = []
        count, peak, file = 0, 0.0, None
        for block in decode_blocks(source):
            peak = max(peak, float(np.abs(block).max(initial=0.0)))
            kept.append(to_int16(block))
            count += len(block)
            if count > _IN_MEMORY:
                file = file or stack.enter_context(tempfile.TemporaryFile())
                _write(file, kept)
                kept.clear()
        if count + slack_samples(info) < info.length:
            stated_s, there_s = info.length / RATE_HZ, count / RATE_HZ
            raise AudioError(
                "cut", f"the file states {stated_s:.3f} s and {there_s:.3f} s decode; {WRITE_AGAIN}", stated_s
            )
        if file is None:
            wave = np.concatenate([np.zeros(0, np.int16), *kept])
            yield Samples(lambda start, stop: wave[start:stop], 0, count, peak)
            return
        descriptor = file.fileno()
        yield Samples(
            lambda start, stop: np.frombuffer(os.pread(descriptor, 2 * (stop - start), 2 * start), np.int16),
            *(0, count, peak),
        )


def _write(file: IO[bytes], blocks: list[np.ndarray]) -> None:
    try:
        file.write(np.concatenate(blocks).tobytes())
        # It is read by its descriptor.
        file.flush()
    except OSError as error:
        raise UserError(
            f"no room for the samples of a long file in {tempfile.gettempdir()} ({error.strerror}): free some space, "
            "or set TMPDIR to another folder"
        ) from None
