"""How many trials run at a time, and what each gets of the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpcscale.errors import UserError

# Past these, trials side by side wait for each other and hold the memory of as many processes.
_MOST_A_CORE, _MOST_A_GPU = 4, 8


@dataclass(frozen=True)
class TrialResources:
    """`trials` at a time, each with so many cores and GPUs, or parts of one."""

    trials: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """The threads that a trial computes with."""
        return max(1, int(self.cpus))

    def described(self) -> str:
        """In words."""
        gpus = f" and {_amount(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{self.trials} at a time, each with {_amount(self.cpus, 'core')}{gpus}"


def plan_resources(
    workers: int, trials: int, device: str, cpus: Sequence[float], gpus: Sequence[float]
) -> TrialResources:
    """The share of each of `trials` where `workers` run at a time, 0 for as many as there is room for.

    `cpus` and `gpus` are what each node has. Room is for one trial a GPU where there is one and `device` allows it,
    else for one a core. Raises UserError for more than 4 trials a core or 8 a GPU, and device=cuda without a GPU.
    """
    cores, cards = sum(cpus), int(sum(gpus)) if device != "cpu" else 0
    if device == "cuda" and not cards:
        raise UserError("fit.device=cuda, but the cluster has no GPU: use fit.device=auto or cpu")
    least = max(1, cards or int(cores))
    side_by_side = min(workers or least, trials)
    most = max(1, int(cards * _MOST_A_GPU if cards else cores * _MOST_A_CORE))
    if side_by_side > most:
        what = f"{cards} GPU(s)" if cards else f"{cores:g} core(s)"
        raise UserError(
            f"workers={workers}: so many trials at a time on {what} would wait for each other, each with the memory of "
            f"a process: give {most} at most, or 0 for one a {'GPU' if cards else 'core'}"
        )
    each = min(cores / side_by_side, max(cpus, default=1.0))
    # Parts that fill a GPU, rounded down so that the last of them has room.
    on_a_card = -(-side_by_side // cards) if cards else 0
    part = 0.0 if not cards else 1.0 if on_a_card == 1 else int(1000 / on_a_card) / 1000
    return TrialResources(side_by_side, float(int(each)) if each >= 1 else int(each * 1000) / 1000, part)


def _amount(number: float, what: str) -> str:
    return f"{number:g} {what}s" if number > 1 else f"1 {what}" if number == 1 else f"{number:g} of a {what}"
