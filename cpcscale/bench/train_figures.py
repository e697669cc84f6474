"""The figures of a train bench: medians over its rounds, and medians of the ratios within each round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpcscale.bench.interleaved import median_ratio
from cpcscale.bench.updates import UpdateMeasurement
from cpcscale.train.time_account import TimeTotals

# {contender: its measurement in each round}.
Rows = Mapping[str, Sequence[UpdateMeasurement]]


@dataclass(frozen=True)
class FixedCosts:
    """Costs that are the same in every round: operations of a forward pass over a second of audio, time marks of an
    update of the loop with and without its network, and the seconds of a mark."""

    flops_per_s: float
    marks: int
    null_marks: int
    mark_s: float


def figures(rows: Rows, costs: FixedCosts, peak_mib: Mapping[int, float]) -> dict[str, Any]:
    """The figures of all measurements; `peak_mib` maps a number of ranks to the sum of their peak memory.

    `seconds` is the time account by phase of the measurement with the median wall time, and adds up to its `wall`;
    `hidden` are its seconds of background work. With several ranks both are those of rank 0.
    """
    together = {str(world): _together(rows, world, peak) for world, peak in peak_mib.items() if world > 1}
    places = [name for name in ("memory", "feed", "null_loop") if name in rows]
    return {
        "audio_s_per_s": {name: round(_rate(rows[name]), 2) for name in ("memory", "feed", "each")},
        **_against_limits(rows, costs),
        "data_wait_share": _waiting(rows["feed"]),
        "peak_mib": round(peak_mib[1]),
        "seconds": {name: _seconds(rows[name]) for name in places},
        "hidden": {name: _hidden(rows[name]) for name in places},
        "ranks": together,
        **_null_loop(rows),
        **_meter(rows, costs),
    }


def _against_limits(rows: Rows, costs: FixedCosts) -> dict[str, float]:
    """Updates in memory against matrix products with as many operations, and against the plain network."""
    operations, gemm = 3 * costs.flops_per_s, _rate(rows["gemm_limit"])
    found = {
        "gemm_gflop_per_s": round(gemm / 1e9, 1),
        "gemm_limit_audio_s_per_s": round(gemm / operations, 2),
        "ratio_to_gemm_limit": round(operations * median_ratio(_rates(rows["memory"]), _rates(rows["gemm_limit"])), 3),
    }
    for name in ("plain_matmul", "plain_gathered"):
        if name in rows:
            found[f"{name}_audio_s_per_s"] = round(_rate(rows[name]), 2)
            found[f"ratio_to_{name}"] = _against(rows, "memory", name)
    if "plain_gathered" in rows:
        found["ratio_each_to_plain_gathered"] = _against(rows, "each", "plain_gathered")
    return found


def _together(rows: Rows, world: int, peak_mib: float) -> dict[str, Any]:
    """The figures of `world` ranks; `peak_mib` is the sum of their peak memory."""
    names = {place: f"{place} of {world}" for place in ("memory", "feed")}
    hidden = {place: _hidden(rows[name]) for place, name in names.items()}
    return {
        **{place: round(_rate(rows[name]), 2) for place, name in names.items()},
        "ratio_to_one": {place: _against(rows, name, place) for place, name in names.items()},
        "data_wait_share": _waiting(rows[names["feed"]]),
        "hidden_allreduce_s": hidden["memory"]["allreduce"],
        "peak_mib": round(peak_mib),
        "seconds": {place: _seconds(rows[name]) for place, name in names.items()},
        "hidden": hidden,
    }


def _null_loop(rows: Rows) -> dict[str, float]:
    if "null_loop" not in rows:
        return {}
    return {
        "null_loop_audio_s_per_s": round(_rate(rows["null_loop"]), 1),
        "feed_alone_audio_s_per_s": round(_rate(rows["feed_alone"]), 1),
        "null_loop_ratio": _against(rows, "null_loop", "feed_alone"),
    }


def _meter(rows: Rows, costs: FixedCosts) -> dict[str, float]:
    """The cost of an update's time marks, as a share of its time."""
    found = {
        "meter_marks": costs.marks,
        "meter_mark_us": round(1e6 * costs.mark_s, 3),
        "meter_share": _share(costs.marks * costs.mark_s, rows["memory"]),
    }
    if "null_loop" in rows:
        found["null_meter_share"] = _share(costs.null_marks * costs.mark_s, rows["null_loop"])
    return found


def _share(spent_s: float, rows: Sequence[UpdateMeasurement]) -> float:
    return float(f"{spent_s / statistics.median(row.wall_s / row.updates for row in rows):.3g}")


def _rates(rows: Sequence[UpdateMeasurement]) -> list[float]:
    return [row.rate for row in rows]


def _rate(rows: Sequence[UpdateMeasurement]) -> float:
    return statistics.median(_rates(rows))


def _against(rows: Rows, mine: str, theirs: str) -> float:
    return round(median_ratio(_rates(rows[mine]), _rates(rows[theirs])), 3)


def _middle(rows: Sequence[UpdateMeasurement]) -> TimeTotals:
    """The account of the measurement with the median wall time; medians of single phases would not add up to it."""
    return sorted((row.stalls for row in rows), key=lambda stalls: stalls.wall_s)[(len(rows) - 1) // 2]


def _waiting(rows: Sequence[UpdateMeasurement]) -> float:
    return round(_middle(rows).rates()["data_wait_share"], 4)


def _seconds(rows: Sequence[UpdateMeasurement]) -> dict[str, float]:
    middle = _middle(rows)
    return {name: round(seconds, 4) for name, seconds in {**middle.exposed_s, "wall": middle.wall_s}.items()}


def _hidden(rows: Sequence[UpdateMeasurement]) -> dict[str, float]:
    return {name: round(seconds, 4) for name, seconds in _middle(rows).hidden_s.items()}
