"""What a recogniser says of one file, as one PNG: the three values over the waveform, and the marks."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cpcscale import audio, storage
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.report.html.plots import BLUE, GREEN, ORANGE, STYLE, escape_dollars
from cpcscale.serve.recogniser import Prediction

# Columns of the waveform, and samples read at a time.
_COLUMNS, _BLOCK = 1600, 60 * audio.RATE_HZ
_COLOURS = dict(zip(PRIMITIVES, (ORANGE, BLUE, GREEN), strict=True))
_WAVE = "#c5ccd3"


def draw_predictions(url: str, name: str, samples: audio.Samples, found: list[Prediction]) -> None:
    """Draws the predictions of a file, or of its segments, as the PNG at `url`."""
    with matplotlib.rc_context(STYLE):
        out = io.BytesIO()
        _figure(name, samples, found).savefig(out, format="png", dpi=150)
    storage.write(url, out.getvalue())


def _figure(name: str, samples: audio.Samples, found: list[Prediction]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes: Any = figure.subplots()
    seconds_C, low_C, high_C = _envelope(samples)
    axes.fill_between(seconds_C, low_C, high_C, color=_WAVE, linewidth=0)
    for primitive, colour in _COLOURS.items():
        place = PRIMITIVES.index(primitive)
        starts = [each.start_s for each in found]
        ends = [each.start_s + each.seconds for each in found]
        units = [each.unit[place] for each in found]
        # A line for each segment, joined to the next; a segment without a value is a gap.
        x = np.stack([starts, ends], axis=1).ravel()
        axes.plot(x, np.repeat(units, 2), color=colour, label=primitive, linewidth=2.0)
    axes.set(xlim=(0, len(samples) / audio.RATE_HZ), ylim=(-1.05, 1.05), xlabel="seconds", ylabel="value on [-1, 1]")
    axes.set_title(escape_dollars(f"{name}   {_said(found)}"))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(_COLOURS))
    return figure


def _said(found: list[Prediction]) -> str:
    """What has to be said with the values: the marks, and why there is none."""
    reasons = sorted({each.reason for each in found if each.reason})
    marks = " ".join(found[0].marks)
    return (f"[{marks}]   " if marks else "") + (f"without a value: {', '.join(reasons)}" if reasons else "")


def _envelope(samples: audio.Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seconds, least, greatest sample) of each column of the waveform, at its own scale in [-1, 1]."""
    edges = np.unique(np.linspace(0, len(samples), _COLUMNS + 1).astype(np.int64))
    low_C, high_C = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    at = 0
    while at < len(low_C):
        # As many columns as fit a block, at least one.
        until = max(at + 1, int(np.searchsorted(edges, edges[at] + _BLOCK, side="right")) - 1)
        block, starts = samples[int(edges[at]) : int(edges[until])], edges[at:until] - edges[at]
        low_C[at:until], high_C[at:until] = np.minimum.reduceat(block, starts), np.maximum.reduceat(block, starts)
        at = until
    loudest = max(float(high_C.max(initial=1)), -float(low_C.min(initial=-1)))
    return edges[:-1] / audio.RATE_HZ, low_C / loudest, high_C / loudest
