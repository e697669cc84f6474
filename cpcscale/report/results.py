"""The results table of a reproduction, for a terminal and as Markdown, with what every figure rests on."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpcscale.emotion.results import BASELINE, PAPER_SYSTEMS
from cpcscale.objective.ccc import PRIMITIVES
from cpcscale.progress import duration
from cpcscale.report.compare import FIGURES, MARKS, NONE, short

_CCC = (
    "CCC: concordance correlation pooled over the test folds, the mean over seeds. [low, high]: its 95 % interval over "
    "speakers (delete-one-speaker jackknife on Fisher z, t with n - 1 degrees of freedom; none below 6 speakers). "
    "recall: unweighted average recall of the categories, from the same features, the mean over seeds +- their "
    "deviation."
)
_BESIDE = (
    "bootstrap: 95 % percentile interval of the mean CCC over speakers, too short where they are few. seeds +-: the "
    "standard deviation over seeds of the pooled CCC, which is no part of any interval. mean of folds: the CCC of each "
    "test fold by itself, then their mean: another quantity than the pooled one. r, RMSE: means over primitives. time: "
    "of all its runs; whichever comes first also decodes the audio."
)
_DEVIATIONS = tuple(f"seeds +- {name}" for name in FIGURES)
_BESIDE_HEAD = ["system", "bootstrap of the mean", *_DEVIATIONS, "mean of folds", "r", "RMSE", "time"]


@dataclass(frozen=True)
class _Table:
    """A title, rows of cells with the header first, and a sentence on how to read it."""

    title: str
    cells: list[list[str]]
    legend: str = ""


def results_lines(table: Mapping[str, Any]) -> list[str]:
    """What `cpcscale reproduce` prints of results.json."""
    lines = [_subject(table)]
    for part in _tables(table):
        lines += ["", part.title, *_aligned(part.cells)]
        lines += textwrap.wrap(part.legend, 110)
    marks = [line for note in _marks(table) for line in textwrap.wrap(note, 110)]
    return lines + (["", *marks] if marks else [])


def results_markdown(table: Mapping[str, Any]) -> str:
    """results.md: the same tables for a README, a pull request or a paper's draft."""
    parts = [f"# {_subject(table)}"]
    for part in _tables(table):
        parts += [f"## {part.title}", "\n".join(_piped(part.cells)), *([part.legend] if part.legend else [])]
    return "\n\n".join([*parts, *_marks(table)]) + "\n"


def forecast_lines(forecast: Mapping[str, Any]) -> list[str]:
    """What `cpcscale reproduce` prints under dry_run: the runs, and the hours that those to come may take."""
    lines = []
    for run in forecast["runs"]:
        seconds = "unknown" if run["seconds"] is None else duration(run["seconds"])
        lines.append(f"  {run['name']:20} {'done in' if run['done'] else 'to do, '} {seconds}")
    coming = len(forecast["runs"]) - forecast["done"]
    unknown = ", ".join(forecast["unknown"])
    rest = f"; not known for {unknown}, of which no run is finished here" if unknown else ""
    head = f"{len(forecast['runs'])} runs, {forecast['done']} of them done; {coming} to come"
    return [f"{head}, about {forecast['hours']:.2f} hours by the finished runs of the same systems{rest}", *lines]


def _subject(table: Mapping[str, Any]) -> str:
    subject = table["subject"]
    marks = f" [{', '.join(subject['marks'])}]" if subject["marks"] else ""
    part = f" ({subject['part']})" if subject["part"] else ""
    left_out = f", {subject['left_out']} left out that not every system could hear" if subject["left_out"] else ""
    sizes = f"{subject['utterances']} utterances of {subject['speakers']} speakers{left_out}"
    return f"{subject['corpus']}{marks}, protocol {subject['protocol']}{part}: {sizes}"


def _tables(table: Mapping[str, Any]) -> list[_Table]:
    rows = table["rows"]
    names = [row["system"] for row in rows]
    made = [
        _Table("Systems", [["system", "seeds", *FIGURES, "recall"], *map(_main_cells, rows)], _CCC),
        _Table("The same predictions otherwise", [_BESIDE_HEAD, *(_beside_cells(row, table) for row in rows)], _BESIDE),
    ]
    made += [_tests(second, tests) for second, tests in table["tests"].items() if tests]
    if table["published"]:
        made.append(_beside_the_paper(table["published"], {name: rows[names.index(name)] for name in names}))
    correlation = zip(PRIMITIVES, table["correlation"], strict=True)
    cells = [["", *PRIMITIVES], *([name, *(short(value) for value in values)] for name, values in correlation)]
    return [*made, _Table("Correlation of the labels (Pearson)", cells)]


def _main_cells(row: Mapping[str, Any]) -> list[str]:
    figures = [_with_interval(row["ccc"][name], (row["interval"] or {}).get(name)) for name in FIGURES]
    return [row["system"], str(len(row["seeds"])), *figures, _deviating(row["recall"], row["recall_deviation"])]


def _beside_cells(row: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    bounds = (row["bootstrap"] or {}).get("mean")
    deviation = row["seed_deviation"] or {}
    measured = [row["agreement"][name]["mean"] for name in ("pearson", "rmse")]
    return [
        row["system"],
        f"[{short(bounds[0], 2)}, {short(bounds[1], 2)}]" if bounds else NONE,
        *(short(deviation.get(name)) for name in FIGURES),
        short(row["ccc_mean_of_folds"]["mean"]),
        *(short(value) for value in measured),
        duration(table["seconds"][row["system"]]),
    ]


def _tests(second: str, tests: Sequence[Mapping[str, Any]]) -> _Table:
    cells = [["system", *FIGURES]]
    for test in tests:
        cells.append([test["first"], *(_tested(test, name) for name in FIGURES)])
    some = tests[0]
    ways = f"all {some['assignments']}" if some["exact"] else f"{some['assignments']} random"
    what = " (the classic system that a learnt one has to beat)" if second == BASELINE else ""
    legend = (
        f"CCC less that of {second}{what}, and p after Holm's correction over the primitives of these {len(tests)} "
        f"tests (of the mean: over the tests); in brackets p without it. Two-sided, by {ways} assignments of the "
        f"predictions of {some['speakers']} speakers to the two systems; no p is below {some['least_p']:.2g}."
    )
    return _Table(f"Against {second}", cells, legend)


def _tested(test: Mapping[str, Any], name: str) -> str:
    difference = short(test["difference"][name])
    sign = "" if difference.startswith("-") else "+"
    return f"{sign}{difference} p {_p(test['p_holm'][name])} ({_p(test['p'][name])})"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else short(value)


def _beside_the_paper(paper: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> _Table:
    cells = [["system", *(f"{name}, {whose}" for name in FIGURES for whose in ("ours", "theirs"))]]
    for system in PAPER_SYSTEMS:
        ours, theirs = rows.get(system, {}).get("ccc", {}), paper["ccc"].get(system, {})
        cells.append([system, *(short(whose.get(name)) for name in FIGURES for whose in (ours, theirs))])
    legend = (
        f"theirs: {paper['source']}; {paper['protocol']}. Our protocol stands above; under another one the figures do "
        "not compare."
    )
    return _Table("Beside the paper", cells, legend)


def _marks(table: Mapping[str, Any]) -> list[str]:
    return [f"{mark}: {MARKS[mark]}" for mark in table["subject"]["marks"] if mark in MARKS]


def _with_interval(value: float, bounds: Sequence[float] | None) -> str:
    return f"{short(value)} [{short(bounds[0], 2)}, {short(bounds[1], 2)}]" if bounds else short(value)


def _deviating(value: float | None, deviation: float | None) -> str:
    return short(value) if deviation is None else f"{short(value)} +- {short(deviation)}"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(text) for text in column) for column in zip(*cells, strict=True)]
    lines = [[text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    return ["  " + "  ".join([raw[0].ljust(widths[0]), *line[1:]]) for raw, line in zip(cells, lines, strict=True)]


def _piped(cells: list[list[str]]) -> list[str]:
    head, *rest = (f"| {' | '.join(line)} |" for line in cells)
    return [head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *rest]
