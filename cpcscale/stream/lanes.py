"""Lanes: L equal slices of the order of an epoch. Each rank reads some lanes, so the order does not depend on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpcscale.errors import UserError

PADDING = -1


@dataclass(frozen=True)
class Lanes:
    """How a run of global batch size B goes through an epoch of N windows (`windows`) in L lanes (`lanes`).

    Lane i has positions [iN/L, (i+1)N/L) of the order. A step takes B/L windows from each lane; the rows of the global
    batch are in the order of the lanes. At the end of an epoch, lanes without windows left give padding.

    >>> lanes = Lanes(windows=10, lanes=2, batch=4)
    >>> [lanes.positions(step, [0, 1])[1].tolist() for step in range(lanes.steps_per_epoch)]
    [[0, 1, 5, 6], [2, 3, 7, 8], [4, -1, 9, -1]]
    """

    windows: int
    lanes: int
    batch: int

    def __post_init__(self) -> None:
        if self.batch % self.lanes:
            below = self.batch // self.lanes * self.lanes
            fitting = f"{below} or {below + self.lanes}" if below else f"{self.lanes}"
            raise UserError(
                f"train.batch={self.batch} is not a multiple of train.lanes={self.lanes}, but every lane gives as many "
                f"windows to a step as the others: use train.batch={fitting}, or change train.lanes"
            )
        if self.windows < self.lanes:
            raise UserError(
                f"the shard set has {self.windows} windows, fewer than train.lanes={self.lanes}: lower train.lanes, "
                "or pack more audio"
            )

    @property
    def per_step(self) -> int:
        """Windows that a lane gives to one step."""
        return self.batch // self.lanes

    @property
    def steps_per_epoch(self) -> int:
        longest = -(-self.windows // self.lanes)
        return -(-longest // self.per_step)

    def positions(self, step: int, lanes: Sequence[int] | int) -> tuple[int, np.ndarray]:
        """(epoch, positions in its order) that these lanes give to `step` (from 0), lane by lane.

        Positions are int64 [lanes * B/L]; -1 is padding.
        """
        epoch, turn = divmod(step, self.steps_per_epoch)
        lane_L = np.atleast_1d(np.asarray(lanes, np.int64))
        first_L, last_L = self.windows * lane_L // self.lanes, self.windows * (lane_L + 1) // self.lanes
        rows = first_L[:, None] + turn * self.per_step + np.arange(self.per_step)
        return epoch, np.where(rows < last_L[:, None], rows, PADDING).reshape(-1)

    def cursors(self, step: int) -> list[list[int]]:
        """[epoch, position] of every lane before `step`; checkpoints store it, to check the step against."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        return [[epoch, min(first + turn * self.per_step, last)] for first, last in map(self.bounds, range(self.lanes))]

    def bounds(self, lane: int) -> tuple[int, int]:
        """(first, last): this lane has positions [first, last) of every epoch."""
        return self.windows * lane // self.lanes, self.windows * (lane + 1) // self.lanes


def lanes_of_rank(lanes: int, rank: int, world: int) -> range:
    """The lanes of `rank` among `world` ranks: rank, rank + world, ... Raises UserError for more ranks than lanes."""
    if world > lanes:
        raise UserError(
            f"{world} workers share train.lanes={lanes} lanes and some would have none: use at most {lanes} workers, "
            "or start a new run with more lanes"
        )
    return range(rank, lanes, world)
