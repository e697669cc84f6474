"""The rows of every global batch of a run, as a pure function of its step: epoch order, lanes and chapters together.

A chapter is a part of a run that uses one version of the shard set. A run starts with one chapter. A new version, with
shards appended, begins another chapter at the start of an epoch; the steps before it do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cpcscale import config
from cpcscale.stream.epoch_order import EpochOrder
from cpcscale.stream.lanes import PADDING, Lanes


@dataclass(kw_only=True)
class OrderConfig:
    """The order of an epoch."""

    # How many windows of a speaker follow each other, where the shard has as many of hers, so that a batch holds
    # several; must divide train.batch / train.lanes. 1: windows of a shard are shuffled whoever speaks.
    run: int = 1

    def __post_init__(self) -> None:
        config.at_least(1, **{"order.run": self.run})


@dataclass(frozen=True)
class Chapter:
    """From `step` on, the first of epoch `epoch`, the run uses the first `shards` shards of its set."""

    step: int
    epoch: int
    shards: int


class RunOrder:
    """Which windows each lane gives to each step.

    `windows` int64 [shards] counts the windows of each shard of the newest version of the set. `run` and `speakers` are
    those of EpochOrder.
    """

    def __init__(
        self,
        windows: np.ndarray,
        seed: int,
        lanes: int,
        batch: int,
        chapters: Sequence[Chapter] = (),
        *,
        run: int = 1,
        speakers: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.chapters = tuple(chapters) or (Chapter(0, 0, len(windows)),)
        self.batch, self.seed = batch, seed
        self._orders = [EpochOrder(windows[: chapter.shards], seed, run, speakers) for chapter in self.chapters]
        self._lanes = [Lanes(order.total, lanes, batch) for order in self._orders]

    @property
    def lanes(self) -> Lanes:
        """The lanes of the newest chapter."""
        return self._lanes[-1]

    @property
    def epoch_order(self) -> EpochOrder:
        """The order of epochs in the newest chapter."""
        return self._orders[-1]

    def steps_for(self, epochs: float) -> int:
        """The number of steps of a run of this many epochs."""
        number = max((n for n, chapter in enumerate(self.chapters) if chapter.epoch <= epochs), default=0)
        chapter = self.chapters[number]
        return max(1, chapter.step + round((epochs - chapter.epoch) * self._lanes[number].steps_per_epoch))

    def rows(self, step: int, lanes: Sequence[int]) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, shard, number of the window in it) that these lanes give to `step`, lane by lane; -1 is padding."""
        number, chapter = self._chapter(step)
        epoch, positions = self._lanes[number].positions(step - chapter.step, lanes)
        epoch += chapter.epoch
        shard, ordinal = np.full(len(positions), PADDING), np.full(len(positions), PADDING)
        real = positions != PADDING
        shard[real], ordinal[real] = self._orders[number].at(epoch, positions[real])
        return epoch, shard, ordinal

    def next_shards(self, step: int, lane: int, most: int) -> list[int]:
        """The next `most` shards that a lane needs from `step` on, in order, of this epoch and the next."""
        shards: list[int] = []
        for first_step in (step, self.next_epoch(step + 1)[0]):
            if len(shards) == most:
                # The next epoch's order is as large as the set, and not needed yet.
                break
            number, chapter = self._chapter(first_step)
            lanes = self._lanes[number]
            epoch, turn = divmod(first_step - chapter.step, lanes.steps_per_epoch)
            first, last = lanes.bounds(lane)
            start = first + turn * lanes.per_step
            shards += self._orders[number].shards_between(chapter.epoch + epoch, start, last, most)
        return list(dict.fromkeys(shards))[:most]

    def cursors(self, step: int) -> list[list[int]]:
        """[epoch, position] of every lane before `step`; checkpoints store it, to check the step against."""
        number, chapter = self._chapter(step)
        return [[epoch + chapter.epoch, place] for epoch, place in self._lanes[number].cursors(step - chapter.step)]

    def next_epoch(self, step: int) -> tuple[int, int]:
        """(step, epoch) of the first epoch that starts at or after `step`."""
        number, chapter = self._chapter(step)
        spans = -(-(step - chapter.step) // self._lanes[number].steps_per_epoch)
        return chapter.step + spans * self._lanes[number].steps_per_epoch, chapter.epoch + spans

    def _chapter(self, step: int) -> tuple[int, Chapter]:
        number = max(n for n, chapter in enumerate(self.chapters) if chapter.step <= step)
        return number, self.chapters[number]
