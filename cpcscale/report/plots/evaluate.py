"""The results of an evaluation as one PNG: CCC under each condition, or by the share of labels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from cpcscale.report.compare import FIGURES
from cpcscale.report.html.plots import FAINT, STYLE, colour_of, escape_dollars

# Distance between the points of two systems at the same condition.
_STEP = 0.08


def curves_png(table: Mapping[str, Any]) -> bytes:
    """A panel for each primitive and one for their mean, a colour for each system; bars are 95 % intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.4), layout="constrained")
        names = ", ".join(each["corpus"] for each in table["corpora"].values())
        marks = f" [{', '.join(table['marks'])}]" if table["marks"] else ""
        figure.suptitle(escape_dollars(f"{names}{marks}, protocol {table['protocol']}"), fontsize=10, x=0.01, ha="left")
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, name in zip(panels.flat, FIGURES, strict=True):
            axes.set_title(name)
            axes.axhline(0, color=FAINT, linewidth=0.9)
            _panel(axes, table, name)
        for axes in panels[:, 0]:
            axes.set_ylabel("CCC")
        figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower left", ncols=6)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _panel(axes: Any, table: Mapping[str, Any], name: str) -> None:
    rows = table["rows"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    if table["kind"] == "learning":
        shares = sorted({row["share"] for row in rows})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(shares))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{100 * share:g} %" for share in shares])
    else:
        conditions = list(dict.fromkeys(row["at"] for row in rows))
        axes.set_xticks(range(len(conditions)), conditions, rotation=45, ha="right")
    for number, system in enumerate(systems):
        of_system = [row for row in rows if row["system"] == system]
        if table["kind"] == "learning":
            of_system.sort(key=lambda row: row["share"])
            places = [row["share"] * (1 + _STEP / 2 * (number - (len(systems) - 1) / 2)) for row in of_system]
        else:
            shift = _STEP * (number - (len(systems) - 1) / 2)
            places = [place + shift for place in range(len(of_system))]
        _curve(axes, places, of_system, name, system, joined=table["kind"] == "learning")


def _curve(
    axes: Any, places: Sequence[float], rows: Sequence[Mapping[str, Any]], name: str, system: str, *, joined: bool
) -> None:
    colour = colour_of(system)
    for place, row in zip(places, rows, strict=True):
        if row["interval"]:
            axes.plot([place, place], row["interval"][name], color=colour, linewidth=1.6, alpha=0.45)
    style = "o-" if joined else "o"
    axes.plot(places, [row["ccc"][name] for row in rows], style, color=colour, markersize=4, label=system)
