"""What `cpcscale reproduce` prints and writes: the results table, and what each figure means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.system_table import BASELINE, PAPER_SYSTEMS
from cpcscale.progress import duration
from cpcscale.report.compare import FIGURES, NONE, short
from cpcscale.report.terminal.tables import Table, mark_notes, markdown, text_lines
from cpcscale.report.terminal.traits import LEGEND, SLOPE_LEGEND, missing_words, trait_cells, with_interval

_CCC = (
    "CCC: concordance correlation pooled over the test folds, the mean over seeds. [low, high]: its 95 % interval over "
    "speakers (delete-one-speaker jackknife on Fisher z, t with n - 1 degrees of freedom; none below 6 speakers). "
    "recall: unweighted average recall of the categories, from the same features, mean over seeds +- deviation."
)
_MORE = (
    "bootstrap: 95 % percentile interval of the mean CCC over speakers, too narrow if speakers are few. seeds +-: "
    "standard deviation over seeds of the pooled CCC; no interval contains it. mean of folds: the mean of the CCC "
    "within each test fold, another quantity than the pooled CCC. r, RMSE: means over primitives. time: of all runs of "
    "the system; the first run also decodes the audio."
)
_DEVIATIONS = tuple(f"seeds +- {name}" for name in FIGURES)
_MORE_HEAD = ["system", "bootstrap of the mean", *_DEVIATIONS, "mean of folds", "r", "RMSE", "time"]


def results_lines(table: Mapping[str, Any]) -> list[str]:
    """The lines that `cpcscale reproduce` prints, from results.json."""
    return text_lines(_subject(table), _tables(table), _marks(table))


def results_markdown(table: Mapping[str, Any]) -> str:
    """results.md: the same tables for a README, a pull request or a paper's draft."""
    return markdown(_subject(table), _tables(table), _marks(table))


def run_lines(listed: Mapping[str, Any]) -> list[str]:
    """The lines that `reproduce` and `evaluate` print for a dry run: which runs are done, and which are left."""
    runs = listed["runs"]
    head = f"{len(runs)} runs: {listed['done']} done, {len(runs) - listed['done']} to do"
    return [head, *(f"  {run['name']:20} {_state(run)}" for run in runs)]


def _state(run: Mapping[str, Any]) -> str:
    return f"done in {duration(run['seconds'])}" if run["done"] else "to do"


def _subject(table: Mapping[str, Any]) -> str:
    subject = table["subject"]
    marks = f" [{', '.join(subject['marks'])}]" if subject["marks"] else ""
    part = f" ({subject['part']})" if subject["part"] else ""
    left_out = (
        f", {subject['left_out']} left out because not every system could read them" if subject["left_out"] else ""
    )
    sizes = f"{subject['utterances']} utterances of {subject['speakers']} speakers{left_out}"
    return f"{subject['corpus']}{marks}, protocol {subject['protocol']}{part}: {sizes}"


def _tables(table: Mapping[str, Any]) -> list[Table]:
    rows = table["rows"]
    names = [row["system"] for row in rows]
    tables = [
        Table("Systems", [["system", "seeds", *FIGURES, "recall"], *(_main_cells(row, table) for row in rows)], _CCC),
        Table(
            "More figures of the same predictions",
            [_MORE_HEAD, *(_more_cells(row, table) for row in rows)],
            _MORE,
        ),
    ]
    tables += [_slopes(rows), *_by_traits(rows)]
    tables += [_tests(second, tests) for second, tests in table["tests"].items() if tests]
    if table["published"]:
        tables.append(_paper_table(table["published"], {name: rows[names.index(name)] for name in names}))
    correlation = zip(PRIMITIVES, table["correlation"], strict=True)
    cells = [["", *PRIMITIVES], *([name, *(short(value) for value in values)] for name, values in correlation)]
    return [*tables, Table("Correlation of the labels (Pearson)", cells)]


def _main_cells(row: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    figures = [with_interval(row["ccc"][name], (row["interval"] or {}).get(name)) for name in FIGURES]
    shown = table.get("shown", {}).get(row["system"], row["system"])
    return [shown, str(len(row["seeds"])), *figures, _with_deviation(row["recall"], row["recall_deviation"])]


def _more_cells(row: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
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


def _slopes(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [[row["system"], *(short(row["agreement"]["slope"][name]) for name in PRIMITIVES)] for row in rows]
    return Table("Calibration slope", [["system", *PRIMITIVES], *cells], SLOPE_LEGEND)


def _by_traits(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    groups = {row["system"]: row["groups"] for row in rows}
    traits = dict.fromkeys(trait for each in groups.values() for trait in each)
    tables = [(trait, trait_cells(trait, groups)) for trait in traits]
    return [Table(f"By {trait}", cells, LEGEND + missing_words(trait, groups)) for trait, cells in tables if cells]


def _tests(second: str, tests: Sequence[Mapping[str, Any]]) -> Table:
    cells = [["system", *FIGURES]]
    for test in tests:
        cells.append([test["first"], *(_difference(test, name) for name in FIGURES)])
    some = tests[0]
    ways = f"all {some['assignments']}" if some["exact"] else f"{some['assignments']} random"
    what = " (the classic system that a learnt one has to beat)" if second == BASELINE else ""
    legend = (
        f"CCC minus that of {second}{what}, its 95 % interval (jackknife over speakers), and p after Holm's "
        f"correction over the primitives of these {len(tests)} tests (for the mean: over the tests); in "
        f"brackets p without it. Two-sided permutation test over {ways} assignments of the predictions of "
        f"{some['speakers']} speakers to the two systems; the smallest possible p is {some['least_p']:.2g}."
    )
    return Table(f"Against {second}", cells, legend)


def _difference(test: Mapping[str, Any], name: str) -> str:
    found = with_interval(test["difference"][name], (test.get("interval") or {}).get(name), True)
    return f"{found} p {_p(test['p_holm'][name])} ({_p(test['p'][name])})"


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else short(value)


def _paper_table(paper: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> Table:
    cells = [["system", *(f"{name}, {side}" for name in FIGURES for side in ("ours", "theirs"))]]
    for system in PAPER_SYSTEMS:
        ours, theirs = rows.get(system, {}).get("ccc", {}), paper["ccc"].get(system, {})
        cells.append([system, *(short(side.get(name)) for name in FIGURES for side in (ours, theirs))])
    legend = (
        f"theirs: {paper['source']}; {paper['protocol']}. Our protocol is in the title; figures of different protocols "
        "do not compare."
    )
    return Table("Compared with the paper", cells, legend)


def _marks(table: Mapping[str, Any]) -> list[str]:
    return mark_notes(table["subject"]["marks"])


def _with_deviation(value: float | None, deviation: float | None) -> str:
    return short(value) if deviation is None else f"{short(value)} +- {short(deviation)}"
