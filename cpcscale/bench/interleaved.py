"""Measurements in turns: what the machine does beside them strikes all alike, and neighbours are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from cpcscale.progress import Progress

Row = TypeVar("Row")


def measure_in_turns(what: str, contenders: Mapping[str, Callable[[], Row]], runs: int) -> dict[str, list[Row]]:
    """`runs` measurements of each contender, one of each after the other, with progress on `what`."""
    rows: dict[str, list[Row]] = {name: [] for name in contenders}
    with Progress(what, runs * len(contenders), "measurements") as progress:
        for turn in range(runs):
            for number, (name, measure) in enumerate(contenders.items()):
                rows[name].append(measure())
                progress.at(turn * len(contenders) + number + 1, name)
    return rows


def median_ratio(mine: Iterable[float], theirs: Iterable[float]) -> float:
    """The median of the ratios of neighbours."""
    return statistics.median(one / other for one, other in zip(mine, theirs, strict=True))


def median_seconds(spent: Sequence[Mapping[str, float]], walls_s: Iterable[float], rest: str) -> dict[str, float]:
    """The median seconds by phase, `rest` with what is left of the median `wall`, and that; they add up."""
    names = dict.fromkeys(name for seconds in spent for name in seconds)
    phases = {name: statistics.median(seconds.get(name, 0.0) for seconds in spent) for name in names}
    wall_s = statistics.median(walls_s)
    whole = {**phases, rest: wall_s - sum(phases.values()), "wall": wall_s}
    return {name: round(seconds, 4) for name, seconds in whole.items()}
