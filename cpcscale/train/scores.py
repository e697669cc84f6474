"""The result of an update or a validation, and the metrics of the global batch that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpcscale.objective.objective import Objective
from cpcscale.train.ranks import Ranks


@dataclass(frozen=True)
class ObjectiveSums:
    """What an objective says of some rows: its sums float64 [M, N], and `count_N` valid elements, on the CPU."""

    objective: Objective
    sums_MN: Tensor
    count_N: Tensor

    @classmethod
    def zero(cls, objective: Objective, device: torch.device) -> ObjectiveSums:
        """The sums over no rows."""
        sums_MN = torch.zeros(objective.shape, dtype=torch.float64, device=device)
        return cls(objective, sums_MN, torch.zeros(objective.shape[1], dtype=torch.int64))

    def __add__(self, other: ObjectiveSums) -> ObjectiveSums:
        return ObjectiveSums(self.objective, self.sums_MN + other.sums_MN, self.count_N + other.count_N)


@dataclass(frozen=True)
class StepResult:
    """The result of one update; `reduce_scores` turns it into metrics.

    `parts` hold the sums over this rank's rows. The rest describes the global batch and is known to the host without
    waiting for the device: the counts of the parts, `samples` of real audio, `bad` windows, rank 0's `request` number
    and whether it `asked` for something new. `scored` says whether the step counted correct predictions and false
    negatives.
    """

    parts: tuple[ObjectiveSums, ...]
    samples: int = 0
    bad: int = 0
    request: int = 0
    asked: bool = False
    scored: bool = True

    @property
    def empty(self) -> bool:
        """Whether the global batch had no valid element, so that there was no update."""
        return not any(any(part.count_N.tolist()) for part in self.parts)


def reduce_scores(parts: Sequence[ObjectiveSums], ranks: Ranks, *, counted: bool = True) -> dict[str, float]:
    """The `figures` of each objective for the rows of all ranks, and `sum_loss` if there are several; on all ranks.

    `counted` says that counts are global already, as in the result of a training step.
    """
    totals = ranks.sum(torch.cat([part.sums_MN.flatten() for part in parts])).cpu()
    counts = torch.cat([part.count_N for part in parts])
    counts = counts if counted else ranks.sum(counts)
    by_part = zip(
        parts,
        totals.split([part.sums_MN.numel() for part in parts]),
        counts.split([len(part.count_N) for part in parts]),
        strict=True,
    )
    values: dict[str, float] = {}
    loss = 0.0
    for part, total, count_N in by_part:
        mean_MN = total.view(part.sums_MN.shape) / count_N.clamp(min=1)
        # A mean over nothing would look like a loss of 0.
        if part is parts[0] or count_N.any():
            values |= part.objective.figures(mean_MN)
        loss += factor(part.objective, parts[0].objective) * float(mean_MN[0].mean())
    return values | ({"sum_loss": loss} if len(parts) > 1 else {})


def factor(objective: Objective, first: Objective) -> float:
    """What the mean loss of an objective is multiplied by in the sum: w / s, times the unit of the `first`."""
    return objective.weight * (first.unit / objective.unit)
