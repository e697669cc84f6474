"""Draws the negatives of each prediction from its scope by a keyed hash; the positive is never among them.

The scope is the frames of the window itself, of all windows of its group, or of the whole global batch. Its n frames of
real audio are numbered 0..n-1, window after window in the order of their keys. N may be larger than n. In a `mixed`
scope the first ceil(N / 2) negatives come from the window itself and the rest from the others of the global batch; a
window without others takes all from itself.

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
    `within_B`, in a mixed scope, counts the frames of the row itself.
    """

    frames: int
    own_B: Tensor
    size_B: Tensor
    first_B: Tensor
    start_R: Tensor
    row_R: Tensor
    within_B: Tensor | None = None

    @classmethod
    def of_rows(cls, frames_B: Tensor, frames: int) -> Scope:
        """Each row draws from its own frames: the scope `utterance`."""
        start_B = frames_B.cumsum(0) - frames_B
        rows_B = torch.arange(len(frames_B), device=frames_B.device)
        return cls(frames, torch.zeros_like(frames_B), frames_B, start_B, start_B, rows_B)

    @classmethod
    def of_pool(
        cls, frames_R: Tensor, key_R: Tensor, label_R: Tensor, frames: int, rows: slice, *, mixed: bool = False
    ) -> Scope:
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
        within_B = frames_R[rows] if mixed else None
        return cls(frames, own_B, size_R[place_R], first_R[place_R], start_R, row_R, within_B)

    def __getitem__(self, piece: slice) -> Scope:
        """The scopes of these rows, in the same pool."""
        within_B = None if self.within_B is None else self.within_B[piece]
        own_B, size_B, first_B = self.own_B[piece], self.size_B[piece], self.first_B[piece]
        return replace(self, own_B=own_B, size_B=size_B, first_B=first_B, within_B=within_B)

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
    bits_BTN = hashed(_step_key(key_B, k).view(-1, 1, 1), t_1TN + n_11N)
    target_1T1 = (torch.arange(targets, device=key_B.device) + k).view(1, -1, 1)
    if scope.within_B is not None:
        part = _MixedParts.of(scope, negatives)
        drawn_BTN = bounded(bits_BTN, (part.size_BN - part.inner_BN.long()).clamp(min=1).unsqueeze(1))
        drawn_BTN += part.inner_BN.unsqueeze(1) & (drawn_BTN >= target_1T1)
        return part.numbers(drawn_BTN)
    drawn_BTN = bounded(bits_BTN, _others(scope).view(-1, 1, 1))
    return drawn_BTN + (drawn_BTN >= scope.own_B.view(-1, 1, 1) + target_1T1)


def draw_shared(key_B: Tensor, scope: Scope, k: int, negatives: int) -> tuple[Tensor, Tensor]:
    """(numbers, spares), both int64 [B, negatives]: the frames drawn for step k, and the spare of each."""
    n_1N = torch.arange(2 * negatives, device=key_B.device).view(1, -1)
    hashed_BN = hashed(_step_key(key_B, k).view(-1, 1), n_1N)
    if scope.within_B is not None:
        part = _MixedParts.of(scope, negatives)
        drawn_BN = bounded(hashed_BN[:, :negatives], part.size_BN.clamp(min=1))
        spare_BN = bounded(hashed_BN[:, negatives:], (part.size_BN - 1).clamp(min=1))
        spare_BN += spare_BN >= drawn_BN
        return part.numbers(drawn_BN.unsqueeze(1)).squeeze(1), part.numbers(spare_BN.unsqueeze(1)).squeeze(1)
    others_B1 = _others(scope).view(-1, 1)
    drawn_BN = bounded(hashed_BN[:, :negatives], scope.size_B.clamp(min=1).view(-1, 1))
    spare_BN = bounded(hashed_BN[:, negatives:], others_B1)
    return drawn_BN, spare_BN + (spare_BN >= drawn_BN)


@dataclass(frozen=True)
class _MixedParts:
    """Which of the N negatives of each row come from the row itself, and from how many frames each is drawn."""

    scope: Scope
    inner_BN: Tensor
    size_BN: Tensor

    @classmethod
    def of(cls, scope: Scope, negatives: int) -> _MixedParts:
        assert scope.within_B is not None
        within_B1, outside_B1 = scope.within_B.unsqueeze(1), (scope.size_B - scope.within_B).unsqueeze(1)
        n_N = torch.arange(negatives, device=within_B1.device)
        inner_BN = (n_N < (negatives + 1) // 2) | (outside_B1 == 0)
        return cls(scope, inner_BN, torch.where(inner_BN, within_B1, outside_B1))

    def numbers(self, drawn_BTN: Tensor) -> Tensor:
        """The numbers in the scope of what was drawn from 0..size-1 of a part."""
        scope = self.scope
        assert scope.within_B is not None
        # From the row's own first frame on, and round: first its own frames, then those of the others.
        passed_B1N = torch.where(self.inner_BN, 0, scope.within_B.unsqueeze(1)).unsqueeze(1)
        return (drawn_BTN + passed_B1N + scope.own_B.view(-1, 1, 1)) % scope.size_B.clamp(min=1).view(-1, 1, 1)


def _step_key(key_B: Tensor, k: int) -> Tensor:
    # k is hashed into the key: were it added, steps k and k + 1 would draw the same frames one place apart.
    return hashed(key_B, torch.tensor(k))


def _others(scope: Scope) -> Tensor:
    return (scope.size_B - 1).clamp(min=1)
