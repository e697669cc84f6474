"""How many trials of a sweep run at the same time, and how many cores and GPUs each of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpcscale.errors import UserError
from cpcscale.machine import threads_of

# With more, trials wait for each other while each holds the memory of a process.
_MOST_A_CORE, _MOST_A_GPU = 4, 8


@dataclass(frozen=True)
class TrialResources:
    """`trials` run at the same time, each with `cpus` cores and `gpus` GPUs; both can be fractions."""

    trials: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """The number of torch threads of a trial."""
        return threads_of(self.cpus)

    def described(self) -> str:
        """In words, such as `2 at a time, each with 1 core`."""
        gpus = f" and {_amount(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{self.trials} at a time, each with {_amount(self.cpus, 'core')}{gpus}"


def plan_resources(
    workers: int, trials: int, device: str, cpus: Sequence[float], gpus: Sequence[float]
) -> TrialResources:
    """The resources of each trial if `workers` of the `trials` run at the same time.

    workers=0 means one trial a GPU, or one a core if there is no GPU or `device` is cpu. `cpus` and `gpus` are the
    numbers of each node. Raises UserError for more than 4 trials a core or 8 a GPU, and for device=cuda without a GPU.
    """
    cores, gpu_count = sum(cpus), int(sum(gpus)) if device != "cpu" else 0
    if device == "cuda" and not gpu_count:
        raise UserError("fit.device=cuda, but the cluster has no GPU: use fit.device=auto or cpu")
    least = max(1, gpu_count or int(cores))
    side_by_side = min(workers or least, trials)
    most = max(1, int(gpu_count * _MOST_A_GPU if gpu_count else cores * _MOST_A_CORE))
    if side_by_side > most:
        what = f"{gpu_count} GPU(s)" if gpu_count else f"{cores:g} core(s)"
        raise UserError(
            f"workers={workers}: so many trials at a time on {what} would wait for each other, each holding the memory "
            f"of a process: give at most {most}, or 0 for one trial a {'GPU' if gpu_count else 'core'}"
        )
    each = min(cores / side_by_side, max(cpus, default=1.0))
    # Fractions of a GPU are rounded down, so that their sum is not above 1.
    on_a_gpu = -(-side_by_side // gpu_count) if gpu_count else 0
    gpu_share = 0.0 if not gpu_count else 1.0 if on_a_gpu == 1 else int(1000 / on_a_gpu) / 1000
    return TrialResources(side_by_side, float(int(each)) if each >= 1 else int(each * 1000) / 1000, gpu_share)


def _amount(number: float, what: str) -> str:
    return f"{number:g} {what}s" if number > 1 else f"1 {what}" if number == 1 else f"{number:g} of a {what}"
