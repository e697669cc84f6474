"""An audit as one picture: durations, sizes of the tars, and who speaks how much in which language."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.report.plots import _STYLE, BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, _plain

_LONGEST_NAME = 24


def write_plot(values: Mapping[str, Any], path: str) -> None:
    """Draws the result of an audit as the PNG at `path`. Raises UserError when it cannot be written."""
    if not path.lower().endswith(".png"):
        raise UserError(f"--plot {path} is not a PNG: give a name that ends in .png")
    with matplotlib.rc_context(_STYLE):
        out = io.BytesIO()
        _figure(values).savefig(out, format="png", dpi=150)
    storage.write(path, out.getvalue())


def _figure(values: Mapping[str, Any]) -> Figure:
    languages, groups = _bars(values["hours_by_language"], values["languages"], values["hours"]), _group_bars(values)
    rows = max(len(languages), len(groups), 4)
    figure = Figure(figsize=(9, 3.1 + 0.6 + 0.2 * rows), layout="constrained")
    figure.suptitle(
        _plain(
            f"{storage.shown(values['shards'])}   {values['tars']:,} tars, {values['utterances']:,} utterances, "
            f"{values['hours']:,.1f} h"
        ),
        fontsize=10,
        color=INK,
        x=0.01,
        ha="left",
    )
    ((durations, sizes), (by_language, by_group)) = figure.subplots(2, 2, height_ratios=[2.4, 0.2 * rows])
    _durations(durations, values)
    _sizes(sizes, values)
    _horizontal(by_language, f"Languages: {values['languages']:,}", languages, GREEN, rows)
    _horizontal(by_group, f"Groups: {values['groups']:,}", groups, PURPLE, rows)
    return figure


def _durations(axes: Any, values: Mapping[str, Any]) -> None:
    edges, counts = values["durations"]["edges_s"], values["durations"]["utterances"]
    axes.set_title("Durations")
    axes.set(xlabel="seconds", ylabel="utterances")
    if not counts:
        return
    widths = [end - begin for begin, end in pairwise(edges)]
    axes.bar(edges[:-1], counts, widths, align="edge", color=BLUE, edgecolor="white", linewidth=0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(top=1.12 * max(counts))
    median = values["duration_s"]["median"]
    axes.axvline(median, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.text(median, 1.0, f" median {median:.2g} s", transform=axes.get_xaxis_transform(), va="top", color=INK)


def _sizes(axes: Any, values: Mapping[str, Any]) -> None:
    edges, tars = values["shard_bytes"]["edges"], values["shard_bytes"]["tars"]
    axes.set_title("Tar sizes")
    axes.set(xlabel="MB", ylabel="tars")
    if tars:
        begins = [edge / 1e6 for edge in edges]
        widths = [end - begin for begin, end in pairwise(begins)]
        axes.bar(begins[:-1], tars, widths, align="edge", color=ORANGE, edgecolor="white", linewidth=0.6)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0, 1.05 * begins[-1])


def _horizontal(axes: Any, title: str, bars: Sequence[tuple[str, float, bool]], colour: str, rows: int) -> None:
    """One bar for each (name, hours, whether it is a name and no rest), the first on top, in room for `rows`."""
    axes.set_title(title)
    places = range(len(bars))
    axes.barh(places, [hours for _, hours, _ in bars], color=[colour if named else FAINT for *_, named in bars])
    axes.set_yticks(places, [_plain(_short(name)) for name, *_ in bars])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set(ylim=(rows - 0.4, -0.6), xlabel="hours")
    axes.grid(axis="y", visible=False)
    for place, (_, hours, _) in enumerate(bars):
        axes.text(hours, place, f" {hours:,.3g}", va="center", color=INK, fontsize=7.5)
    axes.margins(x=0.12)


def _bars(by_name: Mapping[str, float], total: int, hours: float) -> list[tuple[str, float, bool]]:
    """`total` counts the names; hours without one are no name."""
    bars = [(name or "none named", value, bool(name)) for name, value in by_name.items()]
    others = total - sum(named for *_, named in bars)
    rest = hours - sum(value for _, value, _ in bars)
    return [*bars, (f"{others:,} others", rest, False)] if others else bars


def _group_bars(values: Mapping[str, Any]) -> list[tuple[str, float, bool]]:
    bars = _bars(values["hours_by_group"], values["groups"], values["hours_of_groups"])
    alone = values["hours_without_group"]
    return [*bars, ("none named", alone, False)] if alone else bars


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
