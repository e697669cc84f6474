"""One self-contained HTML page that compares tracked runs: it opens from disk and loads nothing from the network."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cpcscale import storage
from cpcscale.report import compare
from cpcscale.report.compare import FIGURES, PRIMITIVES, Row, rounded, short
from cpcscale.report.html import plots, widgets
from cpcscale.report.html.widgets import escape
from cpcscale.tracking.runs import TrackedRun

# Systems, or pretraining runs, that a section draws; its table has all of them.
MOST_DRAWN = 8

Predictions = dict[str, tuple[np.ndarray, np.ndarray]]  # true and predicted values by primitive

_SOFTWARE = (("cpcscale", "version"), ("torch", "torch"), ("ray", "ray"), ("python", "python"))


def write_html(runs: Sequence[TrackedRun], path: str) -> None:
    """Writes the page to `path` (a local path or s3://); all text in it is escaped.

    Tables and plots show the newest run of each name, system, corpus and protocol; a list at the end has every run with
    its parameters.
    """
    storage.write(path, _page(runs).encode())


def _page(runs: Sequence[TrackedRun]) -> str:
    oldest_first = sorted(runs, key=lambda run: run.started_s)
    latest = list({_experiment_of(run): run for run in oldest_first}.values())
    latest.sort(key=lambda run: run.started_s, reverse=True)
    rows = {run.run_id: row for run, row in zip(latest, compare.compare_rows(latest), strict=True)}
    latest.sort(key=lambda run: compare.sort_key(rows[run.run_id]))
    tuned = [run for run in latest if run.kind == "finetune"]
    parts: list[tuple[str, str, str, str]] = []  # anchor, title of its link, heading, markup
    for corpus, protocol in sorted({(run.tag("corpus"), run.tag("protocol")) for run in tuned}):
        group = [run for run in tuned if (run.tag("corpus"), run.tag("protocol")) == (corpus, protocol)]
        name, markup = f"{corpus}, {protocol}", _Recognisers(group, rows).markup()
        parts.append((f"recognisers-{len(parts)}", name, f"Recognisers on {corpus}", markup))
    if sweeps := [rows[run.run_id] for run in latest if run.kind == "sweep"]:
        parts.append(("sweeps", "Sweeps", "Sweeps", _sweeps(sweeps)))
    if trained := [run for run in latest if run.kind == "pretrain"]:
        parts.append(("pretraining", "Pretraining", "Pretraining", _pretraining(trained, rows)))
    parts.append(("runs", "Every run", "Every run", _every_run(runs)))
    links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, *_ in parts)
    head = _header(runs, list(rows.values())) + f"<nav>{links}</nav>\n</header>\n"
    return widgets.document(
        "cpcscale: runs compared",
        head + "".join(widgets.section(anchor, heading, markup) for anchor, _, heading, markup in parts),
    )


def _experiment_of(run: TrackedRun) -> tuple[str, ...]:
    return (run.kind, run.name, *(run.tag(key) for key in ("system", "corpus", "protocol")))


def _header(runs: Sequence[TrackedRun], rows: list[Row]) -> str:
    kinds = [run.kind for run in runs]
    names = (("finetune", "recogniser"), ("sweep", "sweep"), ("pretrain", "pretraining run"))
    counts = ", ".join(
        f"{kinds.count(kind)} {name}{'s' if kinds.count(kind) > 1 else ''}" for kind, name in names if kind in kinds
    )
    now = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    notes = "".join(
        f'<p class="note">{widgets.mark(mark)} {escape(compare.MARKS[mark].capitalize())}</p>\n'
        for mark in compare.marks_of(rows)
        if mark in compare.MARKS
    )
    return (
        f'<header>\n<p class="eyebrow">cpcscale</p>\n<h1>Runs compared</h1>\n<p class="lead">{counts} of the '
        f"experiment <em>{escape(runs[0].experiment if runs else '')}</em>. Written {now}.</p>\n{notes}"
    )


class _Recognisers:
    """The section of one corpus under one protocol: its runs, the best mean CCC first."""

    def __init__(self, runs: list[TrackedRun], rows: Mapping[str, Row]) -> None:
        self.runs = runs
        self.rows = [rows[run.run_id] for run in runs]
        systems = [row["system"] for row in self.rows]
        self.labels = [
            row["name"] if systems.count(row["system"]) > 1 or not row["system"] else row["system"] for row in self.rows
        ]
        first, marks = self.rows[0], compare.marks_of(self.rows)
        self.place = ", ".join([f"{first['corpus']}, protocol {first['protocol']}", *marks])

    def markup(self) -> str:
        first = self.rows[0]
        size = f", {first['speakers']} speakers, {rounded(first['utterances'])} utterances" if first["speakers"] else ""
        marks = " ".join(widgets.mark(mark) for mark in compare.marks_of(self.rows))
        lead = f'<p class="lead">Protocol <strong>{escape(first["protocol"])}</strong>{size} {marks}</p>\n'
        return lead + self._table() + self._intervals() + self._scatters() + self._curves() + self._folds()

    def _table(self) -> str:
        lines = []
        for label, row in zip(self.labels, self.rows, strict=True):
            marks = " ".join(widgets.mark(mark) for mark in row["marks"])
            figures = [_ccc(row["ccc"][figure], (row["interval"] or {}).get(figure)) for figure in FIGURES]
            status = "" if row["status"] == "FINISHED" else f" ({row['status'].lower()})"
            lines.append(
                [f"{_swatch(row)}{escape(label + status)}", escape(row["protocol"]), marks, *figures, _short_id(row)]
            )
        columns = ["System", "Protocol", "Marks", *(figure.capitalize() for figure in FIGURES), "Run"]
        return widgets.table(columns, lines, caption=compare.INTERVAL_LEGEND, words=3)

    def _intervals(self) -> str:
        done = [
            (label, row) for label, row in zip(self.labels, self.rows, strict=True) if row["ccc"]["mean"] is not None
        ]
        if not done:
            return ""
        ends = [0.0]
        for _, row in done:
            ends += [value for value in row["ccc"].values() if value is not None]
            ends += [end for interval in (row["interval"] or {}).values() for end in interval]
        limits = plots.padded(ends)
        drawings = []
        for figure in FIGURES:
            lines = [
                (label, row["system"] or "", row["ccc"][figure], (row["interval"] or {}).get(figure))
                for label, row in done
                if row["ccc"][figure] is not None
            ]
            drawings.append(plots.interval_plot(figure.capitalize(), lines, limits))
        bars = (
            "with its 95 % interval over speakers" if any(row["interval"] for _, row in done) else "without intervals"
        )
        caption = f"CCC pooled over the test folds, {bars} ({self.place})."
        return "<h3>By system</h3>\n" + widgets.figure([("", drawings)], caption, least_px=250)

    def _scatters(self) -> str:
        found: list[tuple[str, Row, Predictions]] = []
        for label, run, row in zip(self.labels, self.runs, self.rows, strict=True):
            if (predictions := _predictions(run)) and len(found) < MOST_DRAWN:
                found.append((label, row, predictions))
        if not found:
            return ""
        limits = {
            primitive: plots.padded([value for *_, columns in found for part in columns[primitive] for value in part])
            for primitive in PRIMITIVES
        }
        few = len(found) <= 2  # a row of plots is a system; with more systems, a primitive

        def panel(label: str, row: Row, columns: Predictions, primitive: str) -> str:
            title = f"{primitive.capitalize() if few else label}  {short(row['ccc'][primitive])}"
            return plots.scatter_plot(title, row["system"] or "", *columns[primitive], limits[primitive])

        if few:
            drawings = [(one[0], [panel(*one, primitive) for primitive in PRIMITIVES]) for one in found]
        else:
            drawings = [(primitive.capitalize(), [panel(*one, primitive) for one in found]) for primitive in PRIMITIVES]
        caption = (
            f"Each point is one test utterance, in the corpus's own units ({self.place}); the dashed line is a perfect "
            f"prediction; the number is the CCC.{_left_out(len(self.runs), len(found))}"
        )
        return "<h3>Predicted against true</h3>\n" + widgets.figure(
            drawings, caption, least_px=220 if few else 150, pairs=True
        )

    def _curves(self) -> str:
        found: list[tuple[str, Row, list[plots.Curve]]] = []
        for label, run, row in zip(self.labels, self.runs, self.rows, strict=True):
            keys = sorted(key for key in run.metrics if re.fullmatch(r"fold\d+_dev_ccc", key))
            curves: list[plots.Curve] = [
                [point for point in run.history(key) if math.isfinite(point[1])] for key in keys
            ]
            if (curves := [curve for curve in curves if curve]) and len(found) < MOST_DRAWN:
                found.append((label, row, curves))
        if not found:
            return ""
        limits = plots.padded([value for *_, curves in found for curve in curves for _, value in curve])
        panels = [plots.folds_plot(label, row["system"] or "", curves, limits) for label, row, curves in found]
        caption = (
            f"Mean CCC on the development speakers by epoch ({self.place}): each fold thin, their mean thick. The best "
            f"epoch of a fold is chosen by it.{_left_out(len(self.runs), len(found))}"
        )
        return "<h3>Fine-tuning</h3>\n" + widgets.figure([("", panels)], caption, least_px=150, pairs=True)

    def _folds(self) -> str:
        lines = []
        for label, run, row in zip(self.labels, self.runs, self.rows, strict=True):
            for number, fold in enumerate(compare.result_of(run).get("folds", [])):
                name = f"{_swatch(row)}{escape(label)}" if number == 0 else ""
                lines.append(
                    [name, str(fold["fold"]), _speakers(fold["test_speakers"]), _speakers(fold["dev_speakers"])]
                )
                lines[-1] += [rounded(fold[f"{part}_utterances"]) for part in ("train", "dev", "test")]
                chosen = fold.get("chosen", {})
                # A support vector machine has no epochs.
                epoch, updates = (chosen.get("epoch"), fold["updates"]) if "epoch" in chosen else (None, None)
                lines[-1] += [compare.NONE if value is None else rounded(value) for value in (epoch, updates)]
                lines[-1] += [_ccc(chosen.get("dev_ccc"))]
                lines[-1] += [_ccc(fold["ccc"].get(figure)) for figure in FIGURES]
        if not lines:
            return ""
        columns = ["System", "Fold", "Test speakers", "Dev. speakers", "Train", "Dev.", "Test", "Best epoch", "Updates"]
        columns += ["Dev. CCC", "Test activ.", "Test valence", "Test domin.", "Test mean"]
        caption = f"Sizes in utterances; CCC within each fold ({self.place})."
        return "<h3>Folds</h3>\n" + widgets.table(columns, lines, caption=caption, words=4, dense=True)


def _sweeps(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        words = [row["name"], *(row[key] or compare.NONE for key in ("system", "corpus", "protocol"))]
        marks = " ".join(widgets.mark(mark) for mark in row["marks"])
        figures = [_ccc(row["inner_ccc"]), rounded(row["trials"]), escape(row["status"].lower()), _short_id(row)]
        lines.append([*map(escape, words), marks, *figures])
    columns = ["Name", "System", "Corpus", "Protocol", "Marks", "inner_ccc", "Trials", "Status", "Run"]
    return widgets.table(columns, lines, caption=compare.SWEEP_LEGEND, words=5)


def _pretraining(runs: list[TrackedRun], rows: Mapping[str, Row]) -> str:
    lines = []
    for run in runs:
        row = rows[run.run_id]
        shares = ("accuracy_mean", "heldout_accuracy_mean", "unseen_accuracy_mean", "accuracy_chance")
        wait = compare.NONE if row["data_wait_share"] is None else f"{100 * row['data_wait_share']:.1f} %"
        lines.append([escape(row["name"]), rounded(row["steps"]), rounded(row["loss"], 3)])
        lines[-1] += [short(row[key]) for key in shares] + [rounded(row["audio_s_per_s"]), wait]
        lines[-1] += [escape(row["status"].lower()), _short_id(row)]
    columns = [
        "Name",
        "Steps",
        "Loss, nats",
        "Accuracy",
        "Held-out",
        "Unseen voice",
        "Chance",
        "Audio s/s",
        "Data wait",
    ]
    table = widgets.table([*columns, "Status", "Run"], lines, caption=compare.PRETRAIN_LEGEND)
    return table + "".join(_pretraining_plots(run, rows[run.run_id]) for run in runs[:MOST_DRAWN])


def _pretraining_plots(run: TrackedRun, row: Row) -> str:
    chance = row["accuracy_chance"]
    loss = run.history("loss")
    if not loss:
        return ""
    by_k: dict[str, dict[int, float]] = {}
    for prefix, source in (("", "training batch"), ("heldout_", "held-out"), ("unseen_", "unseen voice")):
        pattern = re.compile(rf"{prefix}accuracy_k(\d+)")
        found = {int(match[1]): value for key, value in run.metrics.items() if (match := pattern.fullmatch(key))}
        by_k |= {source: found} if found else {}
    drawings = [
        plots.loss_plot(loss, run.history("heldout_loss"), -math.log(chance) if chance else None),
        plots.accuracy_plot(
            run.history("accuracy_mean"),
            run.history("heldout_accuracy_mean"),
            run.history("unseen_accuracy_mean"),
            chance,
        ),
    ]
    if by_k:
        drawings.append(plots.accuracy_by_k_plot(by_k, chance))
    if probed := run.history("probe_audio_hours"):
        curves = {figure: run.history(f"probe_ccc_{figure}") for figure in ("mean", *PRIMITIVES)}
        drawings.append(plots.probe_plot(probed, curves))
    caption = (
        f"Run {run.name}, {rounded(row['steps'])} optimiser steps. Loss in nats, accuracy as a share; pale: single "
        f"batches, dark: their running mean. Dashed: chance, a guess among the positive and N negatives."
        f"{_probed_on(run)}"
    )
    return f"<h3>{escape(run.name)}</h3>\n" + widgets.figure([("", drawings)], caption, least_px=300)


def _probed_on(run: TrackedRun) -> str:
    if not (corpus := run.tag("probe_corpus")):
        return ""
    return f" Probe: CCC on {', '.join([corpus, *filter(None, run.tag('probe_marks').split(','))])}."


def _every_run(runs: Sequence[TrackedRun]) -> str:
    parts = []
    for run in sorted(runs, key=lambda run: run.started_s, reverse=True):
        started = datetime.fromtimestamp(run.started_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        soft = f"{run.kind}, {run.status.lower()}, {started}"
        title = (
            f'<strong>{escape(run.name)}</strong><span class="soft">{escape(soft)}</span><code>{run.run_id[:8]}</code>'
        )
        took = f"{rounded(run.ended_s - run.started_s, 1)} s" if run.ended_s else ""
        dirty = " with uncommitted changes" if run.tag("git_dirty") == "true" else ""
        facts = widgets.facts(
            [
                ("Run id", run.run_id),
                ("Took", took),
                ("Marks", run.tag("marks")),
                ("Git commit", run.tag("git_commit") and run.tag("git_commit") + dirty),
                ("Config hash", run.tag("config_hash")),
                ("Data fingerprint", run.tag("fingerprint")),
                ("Changed on restart", run.tag("changed")),
                ("Software", ", ".join(f"{name} {run.tag(tag)}" for name, tag in _SOFTWARE if run.tag(tag))),
                ("Platform", run.tag("platform")),
            ]
        )
        params = "".join(
            f"<div><span>{escape(key)}</span> {escape(value)}</div>" for key, value in sorted(run.params.items())
        )
        parts.append(widgets.folded(title, facts + (f'<div class="params">{params}</div>\n' if params else "")))
    return '<p class="lead">Newest first, each with its configuration.</p>\n' + "".join(parts)


def _predictions(run: TrackedRun) -> Predictions | None:
    """True and predicted values by primitive, or None when the run has no predictions."""
    if not (data := run.artifact("predictions.csv")):
        return None
    lines = list(csv.DictReader(io.StringIO(data.decode())))
    columns = {
        name: (
            np.array([float(line[name]) for line in lines]),
            np.array([float(line[f"{name}_hat"]) for line in lines]),
        )
        for name in PRIMITIVES
    }
    return columns if lines else None


def _ccc(value: float | None, interval: Sequence[Any] | None = None) -> str:
    text = short(value).replace("-", "\u2212")
    if not interval:
        return text
    low, high = (short(end, 2).replace("-", "\u2212") for end in interval)
    return f'{text}<span class="interval">[{low}, {high}]</span>'


def _short_id(row: Row) -> str:
    return f"<code>{escape(row['run_id'][:8])}</code>"


def _swatch(row: Row) -> str:
    return f'<span class="swatch" style="background: {plots.colour_of(row["system"] or "")}"></span>'


def _speakers(names: Sequence[str]) -> str:
    shown = ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:4])} and {len(names) - 4} more"
    return escape(shown)


def _left_out(all_runs: int, drawn: int) -> str:
    return f" Drawn: the first {drawn} of {all_runs}." if drawn == MOST_DRAWN < all_runs else ""
