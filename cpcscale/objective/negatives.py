"""Draws the negatives of each prediction from its scope by a keyed hash; the positive is never among them.

The scope is the frames of the window itself, of all windows of its group, or of the whole global batch. Its n frames of
real audio are numbered 0..n-1, window after window in the order of their keys. N may be larger than n.

`each`: for every prediction of frame t + k from frame t, N frames are drawn with replacement from the scope without
t + k. `shared`: a window draws N frames for step k, which all its predictions use. If one of them is the positive
t + k, a spare takes its place, which was drawn from all other frames. In both, a negative is any frame but t + k with
equal probability.

A draw depends only on (window key, k, t, number of the draw) and the scope: it is the same for every batch layout,
number of workers and device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cpcscale.objective.hash_random import bounded, hashed


@dataclass(frozen=True)
class Scope:
    """The numbering of frames that B rows draw from, in a pool of R rows of `frames` frames each.

    Row b draws from the `size_B` frames of its scope, in which its own first frame has the number `own_B`. In the
    numbering of the whole pool, its scope starts at `first_B`, and row `row_R` starts at `start_R`, ascending.
    """

    frames: int
    own_B: Tensor
    size_B: Tensor
    first_B: Tensor
    start_R: Tensor
    row_R: Tensor

    @classmethod
    def of_rows(cls, frames_B: Tensor, frames: int) -> Scope:
        """Each row draws from its own frames: the scope `utterance`."""
        start_B = frames_B.cumsum(0) - frames_B
        rows_B = torch.arange(len(frames_B), device=frames_B.device)
        return cls(frames, torch.zeros_like(frames_B), frames_B, start_B, start_B, rows_B)

    @classmethod
    def of_pool(cls, frames_R: Tensor, key_R: Tensor, label_R: Tensor, frames: int, rows: slice) -> Scope:
        """The scopes of these `rows` of a pool: all frames of rows with the same label, in the order of their keys."""
        by_key_R = key_R.argsort()
        row_R = by_key_R[label_R[by_key_R].argsort(stable=True)]
        count_R, label_R = frames_R[row_R], label_R[row_R]
        start_R = count_R.cumsum(0) - count_R
        begins_R = torch.searchsorted(label_R, label_R)
        ends_R = torch.searchsorted(label_R, label_R, right=True) - 1
        first_R = start_R[begins_R]
        size_R = start_R[ends_R] + count_R[ends_R] - first_R
        place_R = row_R.argsort()[rows]
        own_B = (start_R - first_R)[place_R]
        return cls(frames, own_B, size_R[place_R], first_R[place_R], start_R, row_R)

    def __getitem__(self, piece: slice) -> Scope:
        """The scopes of these rows, in the same pool."""
        return replace(self, own_B=self.own_B[piece], size_B=self.size_B[piece], first_B=self.first_B[piece])

    def flat(self, numbers: Tensor) -> Tensor:
        """[B, ...] numbers in a scope as indices into the flat frames of the pool, [R * frames]."""
        numbers = numbers + self.first_B.view(-1, *[1] * (numbers.dim() - 1))
        # Of several rows that start at one number, only the last has frames.
        place = (torch.searchsorted(self.start_R, numbers, right=True) - 1).clamp(min=0)
        # Rows of padding have numbers past the end.
        return ((self.row_R * self.frames - self.start_R)[place] + numbers).clamp(max=len(self.row_R) * self.frames - 1)


def draw_each(key_B: Tensor, scope: Scope, k: int, targets: int, negatives: int) -> Tensor:
    """int64 [B, targets, negatives]: the numbers of the frames drawn as negatives of t + k, for t = 0..targets-1.

    Where frame t + k is not real audio, the numbers mean nothing, and the caller must mask them.

    >>> scope = Scope.of_rows(torch.tensor([4]), frames=4)  # one row with 4 frames, which draws from itself
    >>> draw_each(torch.tensor([7]), scope, k=1, targets=3, negatives=2).tolist()  # for the frames 1, 2 and 3
    [[[0, 0], [1, 0], [0, 0]]]
    """
    t_1TN = (torch.arange(targets, device=key_B.device) * negatives).view(1, -1, 1)
    n_11N = torch.arange(negatives, device=key_B.device).view(1, 1, -1)
    drawn_BTN = bounded(hashed(_step_key(key_B, k).view(-1, 1, 1), t_1TN + n_11N), _others(scope).view(-1, 1, 1))
    target_1T1 = (torch.arange(targets, device=key_B.device) + k).view(1, -1, 1)
    return drawn_BTN + (drawn_BTN >= scope.own_B.view(-1, 1, 1) + target_1T1)


def draw_shared(key_B: Tensor, scope: Scope, k: int, negatives: int) -> tuple[Tensor, Tensor]:
    """(numbers, spares), both int64 [B, negatives]: the frames drawn for step k, and the spare of each."""
    n_1N = torch.arange(2 * negatives, device=key_B.device).view(1, -1)
    hashed_BN = hashed(_step_key(key_B, k).view(-1, 1), n_1N)
    others_B1 = _others(scope).view(-1, 1)
    drawn_BN = bounded(hashed_BN[:, :negatives], scope.size_B.clamp(min=1).view(-1, 1))
    spare_BN = bounded(hashed_BN[:, negatives:], others_B1)
    return drawn_BN, spare_BN + (spare_BN >= drawn_BN)


def _step_key(key_B: Tensor, k: int) -> Tensor:
    # k is hashed into the key: were it added, steps k and k + 1 would draw the same frames one place apart.
    return hashed(key_B, torch.tensor(k))


def _others(scope: Scope) -> Tensor:
    return (scope.size_B - 1).clamp(min=1)
