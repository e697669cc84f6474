"""How one batch is made: its windows are planned and its arrays allocated, then threads fill rows in any order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from cpcscale import audio
from cpcscale.shards.reader import ShardReader
from cpcscale.shards.rows import ShardRows
from cpcscale.stream import window
from cpcscale.stream.lanes import PADDING
from cpcscale.stream.window import WindowConfig

_ARRAYS_KEPT = 15
# 16 h of windows of 10 s; to measure an hour takes half a minute of a core.
_MEASURED_BYTES = 1 << 29


@dataclass(frozen=True)
class BadWindow:
    """A window whose bytes match their checksum but do not decode: it keeps its row in the batch with weight 0.

    `utterance` and `number` identify the window, `key` the utterance and `shard` the tar; `step` is the update, from 1.
    `cause` is one word, `why` a sentence.
    """

    utterance: int
    number: int
    cause: str
    why: str
    key: str
    shard: str
    step: int


@dataclass(frozen=True)
class Measures:
    """What is measured of the samples of each window, in the threads that decode it.

    `measure` maps int16 samples to (float32 [frames, `frame_width`], float32 [`window_width`]), NaN where there is no
    value, with a frame for each `hop_samples`.
    """

    measure: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    hop_samples: int
    frame_width: int
    window_width: int


@dataclass(frozen=True)
class Batch:
    """The rows of one global batch that come from some lanes, lane by lane.

    `wave_BS` int16 is the audio at 16 kHz; `samples_B` is how much of each row counts: 0 for padding, and for bad and
    excluded windows. After it, a row is zero, or repeats the crop of a short utterance. `key_B` int64 keys every random
    choice for the window; `group_B` int64 is equal for windows of one speaker (of one recording where the speaker is
    not known). `utterance_B` (-1 for padding) and `number_B` identify the window. `frame_BTF` and `window_BF` are the
    Measures of a run that has some: float32, NaN where there is no value or no audio.
    """

    step: int
    epoch: int
    wave_BS: np.ndarray
    samples_B: np.ndarray
    key_B: np.ndarray
    group_B: np.ndarray
    utterance_B: np.ndarray
    number_B: np.ndarray
    bad: tuple[BadWindow, ...]
    frame_BTF: np.ndarray | None = None
    window_BF: np.ndarray | None = None

    @property
    def audio_s(self) -> float:
        """Seconds of audio that count in this batch."""
        return float(self.samples_B.sum()) / audio.RATE_HZ


class UnfilledBatch:
    """The arrays of a Batch before they are filled, the start of each window in its utterance, and reads under way."""

    def __init__(self, step: int, epoch: int, wave_BS: np.ndarray) -> None:
        self.step, self.epoch, self.wave_BS = step, epoch, wave_BS
        rows = len(wave_BS)
        self.start_B, self.samples_B, self.key_B, self.group_B = (np.zeros(rows, np.int64) for _ in range(4))
        self.utterance_B, self.number_B = (np.full(rows, PADDING, np.int64) for _ in range(2))
        self.member_B: list[tuple[ShardRows, int] | None] = [None] * rows
        self.read_B: list[Future[bytes] | None] = [None] * rows
        self.bad: list[BadWindow] = []
        # frame_BTF and window_BF of a Batch with measures.
        self.measured: tuple[np.ndarray, np.ndarray] | None = None

    def to_batch(self) -> Batch:
        """The batch, once every row is filled."""
        bad = tuple(sorted(self.bad, key=lambda window: (window.utterance, window.number)))
        arrays = self.wave_BS, self.samples_B, self.key_B, self.group_B, self.utterance_B, self.number_B
        return Batch(self.step, self.epoch, *arrays, bad, *(self.measured or ()))


class WindowReader:
    """Plans, reads, decodes and measures the windows of one shard set."""

    def __init__(self, shards: ShardReader, spec: WindowConfig, seed: int, measures: Measures | None = None) -> None:
        self._shards, self._spec, self._seed, self._measures = shards, spec, seed, measures
        self._waves = _Arrays()
        # The measures of the windows seen first, until they take _MEASURED_BYTES.
        self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def plan(self, step: int, epoch: int, shard_B: np.ndarray, ordinal_B: np.ndarray) -> UnfilledBatch:
        """The unfilled batch of these windows (-1: padding). Starts reading utterances that are not on this node."""
        unfilled = UnfilledBatch(step, epoch, self._waves.empty((len(shard_B), self._spec.samples)))
        for shard in np.unique(shard_B[shard_B != PADDING]).tolist():
            here = np.flatnonzero(shard_B == shard)
            rows = self._shards.rows(shard)
            row, number = window.locate(window.count(self._spec, rows.samples), ordinal_B[here])
            utterance = rows.first + row
            window_id = utterance, number, self._seed, epoch
            unfilled.start_B[here], lengths = window.span(self._spec, rows.samples[row], *window_id)
            # An excluded utterance keeps its row, with weight 0.
            unfilled.samples_B[here] = np.where(rows.excluded[row], 0, lengths)
            unfilled.key_B[here] = window.keys(*window_id)
            unfilled.group_B[here] = rows.group[row]
            unfilled.utterance_B[here], unfilled.number_B[here] = utterance, number
            for slot, member in zip(here.tolist(), row.tolist(), strict=True):
                if unfilled.samples_B[slot]:
                    unfilled.member_B[slot] = rows, member
        if self._measures:
            frames, measures = self._spec.samples // self._measures.hop_samples, self._measures
            shapes = (len(shard_B), frames, measures.frame_width), (len(shard_B), measures.window_width)
            unfilled.measured = np.full(shapes[0], np.nan, np.float32), np.full(shapes[1], np.nan, np.float32)
        for slot, place in enumerate(unfilled.member_B):
            if place:
                unfilled.read_B[slot] = self._shards.start_read(*place)
        return unfilled

    def fill(self, unfilled: UnfilledBatch, rows: range) -> None:
        """Reads and decodes these rows. Raises UserError for data that cannot be read, or changed since indexing."""
        account, repeat = self._shards.account, self._spec.kind == "crop"
        for slot in rows:
            count, wave_S = int(unfilled.samples_B[slot]), unfilled.wave_BS[slot]
            place = unfilled.member_B[slot]
            if place:
                data = self._shards.member(*place, unfilled.read_B[slot])
                unfilled.read_B[slot] = None
                try:
                    audio.decode_slice(data, int(unfilled.start_B[slot]), count, wave_S[:count])
                except audio.AudioError as error:
                    unfilled.bad.append(self._bad(unfilled, slot, *place, error))
                    unfilled.samples_B[slot] = count = 0
                account.mark("decode")
            if unfilled.measured and count:
                self._measure(unfilled, slot, wave_S[:count])
                account.mark("measure")
            if repeat and 0 < count < len(wave_S):
                wave_S[:] = np.resize(wave_S[:count], len(wave_S))
            else:
                wave_S[count:] = 0
            account.mark("collate")

    def _measure(self, unfilled: UnfilledBatch, slot: int, wave_S: np.ndarray) -> None:
        assert self._measures and unfilled.measured
        frame_BTF, window_BF = unfilled.measured
        place = int(unfilled.utterance_B[slot]), int(unfilled.number_B[slot])
        frame_TF, window_F = self._kept.get(place) or self._measures.measure(wave_S)
        frame_BTF[slot, : len(frame_TF)], window_BF[slot] = frame_TF, window_F
        # Crops are others in each epoch; tiles are the same.
        if self._spec.kind == "tile" and len(self._kept) * frame_BTF[0].nbytes < _MEASURED_BYTES:
            self._kept[place] = frame_TF, window_F

    def _bad(self, unfilled: UnfilledBatch, slot: int, rows: ShardRows, row: int, error: audio.AudioError) -> BadWindow:
        shard = self._shards.index.shards["path"][rows.shard].as_py()
        key = str(rows.table["key"][row].as_py())
        place = int(unfilled.utterance_B[slot]), int(unfilled.number_B[slot])
        return BadWindow(*place, error.cause, str(error), key, shard, unfilled.step + 1)


class _Arrays:
    """int16 arrays that are reused when nothing refers to them, for new pages cost a twentieth of the time of decoding.

    An array that a batch, a view or a tensor still refers to is never reused.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def empty(self, shape: tuple[int, int]) -> np.ndarray:
        """An array of this shape, not cleared. For one thread."""
        for number in range(len(self._kept)):
            if self._kept[number].shape == shape and _references(self._kept, number) == _UNUSED:
                return self._kept[number]
        made = np.empty(shape, np.int16)
        self._kept = [*self._kept[-_ARRAYS_KEPT:], made]
        return made


def _references(arrays: list[np.ndarray], number: int) -> int:
    return sys.getrefcount(arrays[number])


# How many references this interpreter counts for an array that only the list refers to.
_UNUSED = _references([np.empty(0)], 0)
