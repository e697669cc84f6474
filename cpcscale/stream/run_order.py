"""The rows of every global batch of a run, as a pure function of its step: plan, lanes and chapters put together.

A run begins with one chapter. A new version of its shard set, with shards appended, enters at the edge of an epoch as a
further chapter; the steps before it do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpcscale.stream.epoch_order import EpochOrder
from cpcscale.stream.lanes import PADDING, Lanes


@dataclass(frozen=True)
class Chapter:
    """From `step` on, which begins epoch `epoch`, the run walks the first `shards` shards of its set."""

    step: int
    epoch: int
    shards: int


class RunOrder:
    """What each lane gives to each step. `windows` int64 [shards]: the windows of every shard of the newest version."""

    def __init__(
        self, windows: np.ndarray, seed: int, lanes: int, batch: int, chapters: Sequence[Chapter] = ()
    ) -> None:
        self.chapters = tuple(chapters) or (Chapter(0, 0, len(windows)),)
        self.batch, self.seed = batch, seed
        self._orders = [EpochOrder(windows[: chapter.shards], seed) for chapter in self.chapters]
        self._lanes = [Lanes(order.total, lanes, batch) for order in self._orders]

    @property
    def lanes(self) -> Lanes:
        """The lanes of the newest chapter."""
        return self._lanes[-1]

    @property
    def epoch_order(self) -> EpochOrder:
        """The plan of the newest chapter."""
        return self._orders[-1]

    def steps_for(self, epochs: float) -> int:
        """The steps of a run of this many epochs."""
        number = max((n for n, chapter in enumerate(self.chapters) if chapter.epoch <= epochs), default=0)
        begun = self.chapters[number]
        return max(1, begun.step + round((epochs - begun.epoch) * self._lanes[number].steps_per_epoch))

    def rows(self, step: int, lanes: Sequence[int]) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, shard, ordinal of the window in it) that these lanes give to `step`, lane by lane; -1 is padding."""
        number, begun = self._chapter(step)
        epoch, positions = self._lanes[number].positions(step - begun.step, lanes)
        epoch += begun.epoch
        shard, ordinal = np.full(len(positions), PADDING), np.full(len(positions), PADDING)
        real = positions != PADDING
        shard[real], ordinal[real] = self._orders[number].at(epoch, positions[real])
        return epoch, shard, ordinal

    def next_shards(self, step: int, lane: int, most: int) -> list[int]:
        """The shards that a lane needs from `step` on, in order, this epoch's and the next's; at most `most`."""
        coming: list[int] = []
        for begin in (step, self.next_epoch(step + 1)[0]):
            if len(coming) == most:
                # The next epoch's order is as large as the set, and not needed yet.
                break
            number, begun = self._chapter(begin)
            lanes = self._lanes[number]
            epoch, turn = divmod(begin - begun.step, lanes.steps_per_epoch)
            first, last = lanes.bounds(lane)
            start = first + turn * lanes.per_step
            coming += self._orders[number].shards_between(begun.epoch + epoch, start, last, most)
        return list(dict.fromkeys(coming))[:most]

    def cursors(self, step: int) -> list[list[int]]:
        """Where every lane stands before `step`: [epoch, position]; kept in checkpoints as a cross-check of t."""
        number, begun = self._chapter(step)
        return [[epoch + begun.epoch, place] for epoch, place in self._lanes[number].cursors(step - begun.step)]

    def next_epoch(self, step: int) -> tuple[int, int]:
        """(step, epoch) of the first edge of an epoch at or after `step`."""
        number, begun = self._chapter(step)
        spans = -(-(step - begun.step) // self._lanes[number].steps_per_epoch)
        return begun.step + spans * self._lanes[number].steps_per_epoch, begun.epoch + spans

    def _chapter(self, step: int) -> tuple[int, Chapter]:
        number = max(n for n, chapter in enumerate(self.chapters) if chapter.step <= step)
        return number, self.chapters[number]
