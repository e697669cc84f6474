"""What an objective of pretraining is, and the adapter of a loss that autograd differentiates.

The loss of a run is L = sum over objectives of w L_o / s. L_o is the mean, over the N classes of an objective (the
steps ahead of InfoNCE, the families of acoustic targets), of the sum over the valid elements of the global batch
divided by their global count. w is the weight in the config, s the objective's `unit`. The whole is multiplied by the
unit of InfoNCE, so that InfoNCE alone keeps its loss in nats.

An objective returns sums and takes the weight of each class from outside. That is why no split over ranks or
micro-batches changes the loss or its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

# The output of a head: tensors of B rows, or of no dimension where all rows share them, such as a temperature.
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rows:
    """What is known of B rows of a batch before the network sees them: int64, but for the measures.

    `frames_B` counts the frames of real audio in each row: 0 for padding, bad and excluded windows. `key_B` keys random
    choices, `group_B` is equal for windows of one speaker, `utterance_B` for windows of one utterance. `content_BT` is
    a hash of the audio of each frame (`infonce.frame_content`), on scored steps only. `frame_BTF` and `window_BF` are
    the measures of handmade/targets.py, where the run has an objective that needs them; NaN where there is no value.
    """

    frames_B: Tensor
    key_B: Tensor
    group_B: Tensor
    utterance_B: Tensor
    content_BT: Tensor | None = None
    frame_BTF: Tensor | None = None
    window_BF: Tensor | None = None

    def __getitem__(self, piece: slice) -> Rows:
        """Some of the rows, as views."""
        known = {name: tensor[piece] for name, tensor in vars(self).items() if tensor is not None}
        return Rows(**known)

    def gathered(self, peers: Peers) -> tuple[Rows, slice]:
        """(rows of all ranks without content and measures, slice of this rank's rows); missing rows have 0 frames."""
        known = (self.frames_B, self.key_B, self.group_B, self.utterance_B)
        parts = [peers.gather_rows(part) for part in known]
        return Rows(*(part for part, _ in parts)), parts[0][1]


@dataclass(frozen=True)
class Features:
    """What the network makes of B rows: latents, contexts, and `predictions_BTKC` = W_k c_t. May be in 16 bits."""

    z_BTC: Tensor
    c_BTD: Tensor
    predictions_BTKC: Tensor


class Peers(Protocol):
    """The ranks of a run, as an objective sees them; see train/ranks.py. All ranks must make the same calls."""

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, slice]:
        """([R, ...] rows of all ranks, slice of this rank's rows), without gradient; missing rows are zero."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over ranks."""


@dataclass(frozen=True)
class Pool:
    """The outputs of a head for the rows of all ranks, and what is known of these."""

    outputs: Outputs
    rows: Rows


class Objective(Protocol):
    """One term of the loss.

    `name` is that of its head in a checkpoint, `weight` is w and `unit` s; `shape` = (M, N): it returns M sums for each
    of N classes. `compares_rows`: its value depends on several rows at once, so that it needs all rows of the rank, and
    may ask for those of other ranks.
    """

    name: str
    weight: float
    unit: float
    shape: tuple[int, int]
    compares_rows: bool

    def head(self, channels: int, width: int) -> nn.Module:
        """A module that maps (Features, Rows) to the Outputs that the loss compares, each row by itself, in fp32.

        z is `channels` wide, c is `width` wide. Initial weights come from torch's global generator, which is seeded.
        """

    def count(self, rows: Rows, peers: Peers) -> Tensor:
        """int64 [N]: the valid elements of these rows for each class. All tensors are on the CPU."""

    def __call__(
        self, outputs: Outputs, rows: Rows, peers: Peers, weight_N: Tensor | None = None
    ) -> tuple[Tensor, Outputs | None]:
        """(sums float64 [M, N], the first of which is the loss; and, given `weight_N`, the gradients of outputs).

        Sums are over the valid elements of these rows. Gradients are those of the weighted sum of the losses of all
        ranks' rows. `outputs` are detached.
        """

    def figures(self, mean_MN: Tensor) -> dict[str, float]:
        """The metrics by name, from float64 means over valid elements."""

    def by_row(self) -> Objective | None:
        """Itself as a score of each row alone, which held-out windows get; None if there is none."""


class AutogradObjective(Objective):
    """The adapter of a plain loss: a subclass defines `loss`, and autograd makes the gradients.

    >>> class Distance(AutogradObjective):
    ...     def loss(self, outputs, rows, pool=None):
    ...         return (outputs[0] - outputs[1]).square().sum((0, 1)).view(1, 1)
    >>> rows = Rows(*4 * [torch.zeros(2)])
    >>> sums, gradients = Distance()((torch.ones(2, 3), torch.zeros(2, 3)), rows, None, torch.tensor([0.5]))
    >>> sums.item(), gradients[0].unique().item(), gradients[1].unique().item()
    (6.0, 1.0, -1.0)
    """

    unit: float = 1.0
    compares_rows: bool = False

    def loss(self, outputs: Outputs, rows: Rows, pool: Pool | None = None) -> Tensor:
        """The sums [M, N] over these rows, with their graph. An objective that `compares_rows` is given a pool."""
        raise NotImplementedError

    def by_row(self) -> Objective | None:
        return None if self.compares_rows else self

    def __call__(
        self, outputs: Outputs, rows: Rows, peers: Peers, weight_N: Tensor | None = None
    ) -> tuple[Tensor, Outputs | None]:
        learnt = weight_N is not None
        leaves = tuple(output.detach().requires_grad_(learnt) for output in outputs)
        pool, own = None, slice(None)
        if self.compares_rows:
            everyone, own = rows.gathered(peers)
            # What all rows share, such as a temperature, is the same on all ranks.
            gathered = (peers.gather_rows(leaf)[0].detach() if leaf.dim() else leaf for leaf in leaves)
            pool = Pool(tuple(part if not part.dim() else part.requires_grad_(learnt) for part in gathered), everyone)
        with torch.set_grad_enabled(learnt):
            sums_MN = self.loss(leaves, rows, pool)
        if weight_N is None:
            return sums_MN.double(), None
        weighted = (sums_MN[0] * weight_N).sum()
        inputs = (*leaves, *(pool.outputs if pool else ()))
        found = torch.autograd.grad(weighted, inputs, allow_unused=True, materialize_grads=True)
        gradients = found[: len(leaves)]
        if pool:
            # As negatives, this rank's rows get gradients from the losses of all ranks; of what is shared, DDP adds up.
            pairs = zip(gradients, found[len(leaves) :], strict=True)
            gradients = tuple(one + peers.sum(other)[own] if one.dim() else one for one, other in pairs)
        return sums_MN.detach().double(), gradients
