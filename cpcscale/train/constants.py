"""The constants by which a new run standardises its targets: mean and deviation over some training windows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cpcscale.errors import UserError
from cpcscale.machine import usable_cores
from cpcscale.objective.acoustic import Standardised
from cpcscale.stream.epoch_order import mix
from cpcscale.stream.feed import FeedSource, fixed_batches
from cpcscale.train.ranks import Ranks
from cpcscale.train.step import ContrastiveModel

# Windows of which measures are taken: 10 s each take a minute of one core. The error of a deviation is 3 %.
WINDOWS = 500
_KEY = -3
_AT_ONCE = 8


def set_constants(contrast: ContrastiveModel, source: FeedSource, ranks: Ranks) -> None:
    """Sets the constants of all targets of a new run, from keyed windows of epoch 0; ranks share the work.

    Raises UserError on every rank when one of them cannot read its windows.
    """
    modules = [module for module in contrast.modules() if isinstance(module, Standardised)]
    positions = keyed_positions(source.order.epoch_order.total, source.order.seed)[ranks.rank :: ranks.world]
    threads = max(1, usable_cores() // ranks.on_node)
    totals, failed = [torch.zeros(3, len(module.mean_F), dtype=torch.float64) for module in modules], None
    try:
        with ThreadPoolExecutor(threads) as pool:
            pieces = [positions[number::threads] for number in range(threads)]
            for sums in pool.map(lambda piece: _sums(source, piece, modules), pieces):
                totals = [total + part for total, part in zip(totals, sums, strict=True)]
    except UserError as error:
        failed = error
    ranks.raise_on_all(failed)
    for module, total in zip(modules, totals, strict=True):
        count_F, sum_F, square_F = ranks.sum(total)
        mean_F = sum_F / count_F.clamp(min=1)
        deviation_F = (square_F / count_F.clamp(min=1) - mean_F.square()).clamp(min=0).sqrt()
        module.set(mean_F, deviation_F)


def keyed_positions(total: int, seed: int) -> np.ndarray:
    """int64: positions of WINDOWS of `total` windows, or of all; a few less where two draws are one."""
    if total <= WINDOWS:
        return np.arange(total)
    return np.unique(mix(np.arange(WINDOWS), seed, _KEY) % np.uint64(total)).astype(np.int64)


def _sums(source: FeedSource, positions: np.ndarray, modules: list[Standardised]) -> list[Tensor]:
    """float64 [3, F] of each module: how many values are known, their sum, and that of their squares."""
    totals = [torch.zeros(3, len(module.mean_F), dtype=torch.float64) for module in modules]
    for batch in fixed_batches(source, positions, _AT_ONCE):
        for total, module in zip(totals, modules, strict=True):
            values = torch.from_numpy(getattr(batch, module.source)).double().flatten(0, -2)
            known = values.isfinite()
            values = torch.where(known, values, 0.0)
            total += torch.stack([known.sum(0), values.sum(0), values.square().sum(0)])
    return totals
