"""The small plots of the HTML page, each as inline SVG that refers to nothing outside it.

Text stays text in the font of the page; the points of a scatter are one embedded picture, so that the page stays small.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]  # (step or epoch, value)

INK, FAINT, GRID = "#1f2933", "#8a94a0", "#e6e9ed"
# Okabe and Ito's colours, told apart by colour-blind readers; the two controls are grey.
BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"
_SYSTEMS = {"precpc": BLUE, "minicpc": SKY, "raw": GREEN, "mfcc": ORANGE, "logmel": PURPLE}
_CONTROLS = {"mean": "#9aa3ad", "random": "#6b7580"}
# Points of one curve; more cannot be seen at the width of a panel.
_MOST_POINTS = 500
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cpcscale",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": "#c5ccd3",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#52606d",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#c5ccd3",
    "ytick.color": "#c5ccd3",
    "xtick.labelcolor": "#52606d",
    "ytick.labelcolor": "#52606d",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.4,
}
_prefixes = count()


def colour_of(system: str) -> str:
    """The colour of a system, the same in every plot."""
    return (_SYSTEMS | _CONTROLS).get(system.lower(), RED)


def loss_plot(loss: Curve, heldout: Curve, chance: float | None) -> str:
    """InfoNCE loss in nats over optimiser steps, with chance as a dashed line."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.5, 2.8, "Loss")
        _noisy(axes, loss, BLUE, "training")
        _line(axes, heldout, ORANGE, "held-out")
        _chance_line(axes, chance, "chance, ln(N+1)")
        axes.set(xlabel="optimiser step", ylabel="InfoNCE, nats")
        figure.legend(loc="outside lower left", ncols=2)
        return _svg(figure, "InfoNCE loss over optimiser steps")


def accuracy_plot(training: Curve, heldout: Curve, unseen: Curve, chance: float | None) -> str:
    """Accuracy, mean over the prediction steps, over optimiser steps, against chance."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.5, 2.8, "Accuracy, mean over k")
        _noisy(axes, training, BLUE, "training")
        _line(axes, heldout, ORANGE, "held-out")
        _line(axes, unseen, GREEN, "unseen voice")
        _chance_line(axes, chance, "chance, 1/(N+1)")
        axes.set(xlabel="optimiser step", ylabel="share right")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower left", ncols=2)
        return _svg(figure, "Accuracy over optimiser steps")


def accuracy_by_k_plot(by_source: Mapping[str, Mapping[int, float]], chance: float | None) -> str:
    """Accuracy of each prediction step k (10 ms each) at the last logged optimiser step, against chance."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.5, 2.8, "Accuracy for each k")
        for (source, by_k), colour in zip(by_source.items(), (BLUE, ORANGE, GREEN), strict=False):
            steps = sorted(by_k)
            axes.plot(steps, [by_k[k] for k in steps], "o-", color=colour, markersize=3.5, label=source)
        _chance_line(axes, chance, "chance, 1/(N+1)")
        axes.set(xlabel="k, frames ahead (10 ms each)", ylabel="share right")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower left", ncols=2)
        return _svg(figure, "Accuracy for each prediction step")


def probe_plot(hours: Curve, by_figure: Mapping[str, Curve]) -> str:
    """CCC of the probes by figure (mean and the primitives) over hours of training audio; both curves are by step."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(3.5, 2.8, "Probe")
        hours_at = dict(hours)
        colours = (BLUE, ORANGE, GREEN, PURPLE)
        for (name, curve), colour in zip(by_figure.items(), colours, strict=False):
            points = _drawable([(step, value) for step, value in curve if step in hours_at])
            x, y = [hours_at[step] for step, _ in points], [value for _, value in points]
            width = 2.2 if name == "mean" else 1.2
            axes.plot(x, y, "o-", color=colour, linewidth=width, markersize=3, label=name)
        axes.set(xlabel="hours of audio", ylabel="CCC")
        figure.legend(loc="outside lower left", ncols=2)
        return _svg(figure, "CCC of the probes over hours of audio")


def interval_plot(
    title: str, rows: Sequence[tuple[str, str, float, Sequence[float] | None]], limits: tuple[float, float]
) -> str:
    """One line for each (label, system, CCC, interval or None), the first on top."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(2.75, 0.62 + 0.27 * len(rows), title)
        axes.axvline(0, color=FAINT, linewidth=0.9)
        for place, (_, system, value, interval) in enumerate(rows):
            colour = colour_of(system)
            if interval:
                axes.plot(interval, [place, place], color=colour, linewidth=2.2, alpha=0.55)
            axes.plot([value], [place], "o", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=0.9)
        axes.set_yticks(range(len(rows)), [escape_dollars(label) for label, *_ in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set(xlim=limits, ylim=(len(rows) - 0.4, -0.6), xlabel="CCC")
        axes.grid(axis="y", visible=False)
        return _svg(figure, f"{title}: CCC by system with intervals")


def scatter_plot(title: str, system: str, true: np.ndarray, predicted: np.ndarray, limits: tuple[float, float]) -> str:
    """Predicted against true in the corpus's own units, on equal axes with the identity line."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = _panel(2.1, 2.1, title)
        axes.plot(limits, limits, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        alpha, size = (0.5, 9) if len(true) <= 600 else (0.15, 4)
        axes.scatter(true, predicted, s=size, color=colour_of(system), alpha=alpha, linewidths=0, rasterized=True)
        axes.set(xlim=limits, ylim=limits, xlabel="true", ylabel="predicted", aspect="equal")
        axes.set_yticks([tick for tick in axes.get_xticks() if limits[0] <= tick <= limits[1]])
        return _svg(figure, f"{title}: predicted against true")


def folds_plot(title: str, system: str, folds: Sequence[Curve], limits: tuple[float, float]) -> str:
    """Development CCC by epoch: each fold thin, their mean (while all folds run) thick."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(2.1, 1.75, title)
        colour = colour_of(system)
        for fold in folds:
            axes.plot(*zip(*fold, strict=True), color=colour, linewidth=0.9, alpha=0.45, marker=".", markersize=3)
        values = [dict(fold) for fold in folds]
        shared = sorted(set.intersection(*(set(fold) for fold in values)))
        axes.plot(
            shared, [float(np.mean([fold[epoch] for fold in values])) for epoch in shared], color=colour, linewidth=2.2
        )
        axes.set(xlabel="epoch", ylabel="dev. CCC", ylim=limits)
        axes.xaxis.get_major_locator().set_params(integer=True)
        return _svg(figure, f"{title}: development CCC by epoch")


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of `values` with a margin on either side."""
    low, high = min(values), max(values)
    margin = share * ((high - low) or 1.0)
    return low - margin, high + margin


def _panel(width: float, height: float, title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=220, layout="constrained")
    axes = figure.subplots()
    axes.set_title(escape_dollars(title))
    return figure, axes


def escape_dollars(text: str) -> str:
    """`text` with its dollar signs escaped, which would start a formula in matplotlib."""
    return text.replace("$", r"\$")


def _line(axes: Any, curve: Curve, colour: str, label: str) -> None:
    if curve := _drawable(curve):
        style = "o-" if len(curve) <= 30 else "-"
        axes.plot(*zip(*curve, strict=True), style, color=colour, markersize=3, label=label)


def _noisy(axes: Any, curve: Curve, colour: str, label: str) -> None:
    """A curve of single batches: every value pale, and their running mean over a fortieth of the run."""
    curve = _drawable(curve)
    if len(curve) < 40:
        _line(axes, curve, colour, label)
        return
    steps, values = np.asarray(curve).T
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    width = max(3, len(values) // 40) | 1
    ends = np.pad(values, width // 2, mode="edge")
    axes.plot(steps, np.convolve(ends, np.ones(width) / width, mode="valid"), color=colour, label=label)


def _drawable(curve: Curve) -> list[tuple[int, float]]:
    """The finite points, thinned evenly to what a panel can show."""
    points = [point for point in curve if math.isfinite(point[1])]
    if len(points) <= _MOST_POINTS:
        return points
    return [points[round(place)] for place in np.linspace(0, len(points) - 1, _MOST_POINTS)]


def _chance_line(axes: Any, chance: float | None, label: str) -> None:
    if chance is not None:
        axes.axhline(chance, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label=label)


def _svg(figure: Figure, description: str) -> str:
    text = io.StringIO()
    # Without its blocks of origin and name spaces, which HTML does not need, a drawing names no address at all.
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = text.getvalue()
    body = re.sub(r"<!--.*?-->\n?", "", body[body.index("<svg") :], flags=re.DOTALL)
    # Several drawings share one page, so their names must differ.
    prefix = f"p{next(_prefixes)}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", body)
    opening = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', body)
    assert opening
    widest_px = 1.5 * float(opening[1])  # beyond it the letters are larger than the page's
    head = (
        f'<svg class="plot" style="max-width: {widest_px:.0f}px" role="img" aria-label="{html.escape(description)}" '
        f"{opening[0]}>"
    )
    return head + body[body.index(">") + 1 :]
