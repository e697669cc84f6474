"""The result of an audit as one PNG: durations, sizes of the tars, and hours by language and by group."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.report.html.plots import BLUE, GREEN, INK, ORANGE, PURPLE, STYLE, escape_dollars

_LONGEST_NAME = 24


def write_plot(values: Mapping[str, Any], path: str) -> None:
    """Draws the result of an audit as the PNG at `path`. Raises UserError when it cannot be written."""
    if not path.lower().endswith(".png"):
        raise UserError(f"--plot {path} is not a PNG: give a name that ends in .png")
    with matplotlib.rc_context(STYLE):
        out = io.BytesIO()
        _figure(values).savefig(out, format="png", dpi=150)
    storage.write(path, out.getvalue())


def _figure(values: Mapping[str, Any]) -> Figure:
    languages, groups = _named(values["hours_by_language"]), _named(values["hours_by_group"])
    rows = max(len(languages), len(groups), 4)
    figure = Figure(figsize=(9, 3.1 + 0.6 + 0.2 * rows), layout="constrained")
    figure.suptitle(
        escape_dollars(
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
    unnamed = values["hours_by_language"].get("", 0.0)
    rest = _rest(values["languages"], languages, values["hours"] - unnamed, unnamed)
    _horizontal(by_language, f"Languages: {values['languages']:,}", languages, rest, GREEN, rows)
    rest = _rest(values["groups"], groups, values["hours_of_groups"], values["hours_without_group"])
    _horizontal(by_group, f"Groups: {values['groups']:,}", groups, rest, PURPLE, rows)
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
    axes.yaxis.set_major_formatter(_count)
    median = values["duration_s"]["median"]
    axes.axvline(median, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.text(median, 1.0, f" median {median:.2g} s", transform=axes.get_xaxis_transform(), va="top", color=INK)


def _count(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _sizes(axes: Any, values: Mapping[str, Any]) -> None:
    edges, tars = values["shard_bytes"]["edges"], values["shard_bytes"]["tars"]
    axes.set_title("Tar sizes")
    axes.set(xlabel="MB", ylabel="tars")
    if tars:
        begins = [edge / 1e6 for edge in edges]
        widths = [end - begin for begin, end in pairwise(begins)]
        axes.bar(begins[:-1], tars, widths, align="edge", color=ORANGE, edgecolor="white", linewidth=0.6)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter(_count)
        # The tars of a packed set have nearly equal sizes: on an axis from 0 they would be one thin bar.
        margin = max(0.05 * (begins[-1] - begins[0]), 0.002 * begins[-1])
        axes.set_xlim(begins[0] - margin, begins[-1] + margin)


def _horizontal(axes: Any, title: str, bars: Mapping[str, float], rest: str, colour: str, rows: int) -> None:
    """A bar of hours for each name, the first on top, in an axis of `rows` bars; `rest` says what is not drawn."""
    axes.set_title(title)
    axes.barh(range(len(bars)), bars.values(), color=colour)
    axes.set_yticks(range(len(bars)), [escape_dollars(_short(name)) for name in bars])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set(ylim=(rows - 0.4, -0.6), xlabel=f"hours{rest}")
    axes.set_xlim(0, 1.15 * max(bars.values(), default=1.0))
    axes.grid(axis="y", visible=False)
    for place, hours in enumerate(bars.values()):
        axes.text(hours, place, f" {hours:,.3g}", va="center", color=INK, fontsize=7.5)


def _named(by_name: Mapping[str, float]) -> dict[str, float]:
    return {name: hours for name, hours in by_name.items() if name}


def _rest(total: int, bars: Mapping[str, float], hours: float, unnamed: float) -> str:
    """The names and hours that are not drawn: other names, and hours without a name."""
    others = total - len(bars)
    parts = [f"{others:,} others: {hours - sum(bars.values()):,.3g}"] if others else []
    parts += [f"none named: {unnamed:,.3g}"] if unnamed > 0 else []
    return f" ({'; '.join(parts)})" if parts else ""


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
