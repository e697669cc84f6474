"""Measures contenders in turns, so that other load on the machine affects all alike, and compares round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from cpcscale.progress import Progress

Row = TypeVar("Row")


def measure_in_turns(what: str, contenders: Mapping[str, Callable[[], Row]], runs: int) -> dict[str, list[Row]]:
    """{name: rows}: `runs` rounds, in each of which every contender is measured once. Shows progress as `what`."""
    rows: dict[str, list[Row]] = {name: [] for name in contenders}
    with Progress(what, runs * len(contenders), "measurements") as progress:
        for turn in range(runs):
            for number, (name, measure) in enumerate(contenders.items()):
                rows[name].append(measure())
                progress.update(turn * len(contenders) + number + 1, name)
    return rows


def median_ratio(mine: Iterable[float], theirs: Iterable[float]) -> float:
    """The median of the ratios of measurements from the same round."""
    return statistics.median(one / other for one, other in zip(mine, theirs, strict=True))


def median_seconds(spent: Sequence[Mapping[str, float]], walls_s: Iterable[float], rest: str) -> dict[str, float]:
    """Median seconds by phase, the median `wall` time, and under the name `rest` the difference."""
    names = dict.fromkeys(name for seconds in spent for name in seconds)
    phases = {name: statistics.median(seconds.get(name, 0.0) for seconds in spent) for name in names}
    wall_s = statistics.median(walls_s)
    whole = {**phases, rest: wall_s - sum(phases.values()), "wall": wall_s}
    return {name: round(seconds, 4) for name, seconds in whole.items()}
