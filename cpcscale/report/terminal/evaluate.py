"""What `cpcscale evaluate` prints and writes: degraded audio, fewer labels, other corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpcscale.report.compare import FIGURES, NONE
from cpcscale.report.terminal.tables import Table, mark_notes, markdown, text_lines
from cpcscale.report.terminal.traits import with_interval

PAGE, CURVES = "results.md", "curves.png"
_TITLES = {
    "robustness": "Trained on clean audio, tested on degraded",
    "learning": "Trained on a share of the labels",
    "cross": "Trained on one corpus, tested on another",
}
_CCC = (
    "CCC: concordance correlation of all test predictions pooled, the mean over seeds. [low, high]: its 95 % interval "
    "over speakers (delete-one-speaker jackknife on Fisher z, t with n - 1 degrees of freedom; none below 6 speakers)."
)
_LEGENDS = {
    "robustness": (
        "noiseN: pink noise N dB below the level of the utterance; reverb: a reverberation of 0.6 s as loud as the "
        "direct path, level kept; telephone: 300 to 3400 Hz; gainN: N dB louder or softer, clipped at full scale."
    ),
    "learning": (
        "share: of the utterances of each training and development speaker, at least one each; a share contains the "
        "smaller ones, and the test part is always the same. labelled: utterances in the training and development part "
        "of a fold, mean over folds. minicpc is pretrained on these only; precpc keeps all its unlabelled audio."
    ),
    "cross": (
        "Row: the corpus that is trained on, except for its development speakers. Column: the corpus that is tested "
        "on. The diagonal is each corpus's own speaker-disjoint protocol. Labels of each corpus are mapped from its "
        "scale to [-1, 1]. Scales, raters and their questions differ between corpora, so a low score across corpora is "
        "partly a matter of labels."
    ),
}
_CHANGE = (
    "change: CCC minus the CCC on clean audio of the same utterances; its interval is a delete-one-speaker jackknife "
    "of the difference."
)


def evaluate_lines(table: Mapping[str, Any]) -> list[str]:
    """The lines that `cpcscale evaluate` prints, from results.json."""
    return text_lines(*_parts(table))


def evaluate_files(table: Mapping[str, Any]) -> dict[str, bytes]:
    """results.md, and curves.png for all kinds but cross."""
    page = {PAGE: markdown(*_parts(table)).encode()}
    if table["kind"] == "cross":
        return page
    # Imported here: it loads matplotlib, which a table does not need.
    from cpcscale.report.plots.evaluate import curves_png

    return page | {CURVES: curves_png(table)}


def _parts(table: Mapping[str, Any]) -> tuple[str, list[Table], list[str]]:
    marks = f" [{', '.join(table['marks'])}]" if table["marks"] else ""
    names = ", ".join(each["corpus"] for each in table["corpora"].values())
    head = f"{_TITLES[table['kind']]}: {names}{marks}, protocol {table['protocol']}"
    rows = table["rows"]
    match table["kind"]:
        case "robustness":
            tables = [
                Table("CCC", _cells(rows, "ccc", "interval", {"condition": "at"}), f"{_CCC} {_LEGENDS['robustness']}"),
                Table("Change", _cells(rows, "change", "change_interval", {"condition": "at"}), _CHANGE),
            ]
        case "learning":
            cells = _cells(rows, "ccc", "interval", {"share": "at", "labelled": "labelled"})
            tables = [Table("CCC", cells, f"{_CCC} {_LEGENDS['learning']}")]
        case _:
            tables = [*_matrices(rows), _corpora(table)]
    return head, tables, mark_notes(table["marks"])


def _cells(rows: Sequence[Mapping[str, Any]], figure: str, bounds: str, places: Mapping[str, str]) -> list[list[str]]:
    cells = [["system", "seeds", *places, "utterances", "speakers", *FIGURES]]
    for row in rows:
        if row[figure] is None:
            continue
        sizes = [str(row["utterances"]), str(row["speakers"])]
        figures = [
            with_interval(row[figure][name], (row[bounds] or {}).get(name), figure == "change") for name in FIGURES
        ]
        where = [_short(row[key]) for key in places.values()]
        cells.append([row.get("shown", row["system"]), str(len(row["seeds"])), *where, *sizes, *figures])
    return cells


def _matrices(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A matrix for each system and figure; the mean over primitives comes first."""
    tables = []
    for system in dict.fromkeys(row["system"] for row in rows):
        of_system = {(row["train"], row["test"]): row for row in rows if row["system"] == system}
        names = list(dict.fromkeys(test for _, test in of_system))
        for figure in (FIGURES[-1], *FIGURES[:-1]):
            cells = [["trained on \\ tested on", *names]]
            for train in names:
                found = [of_system.get((train, test)) for test in names]
                cells.append([train, *(_figure(row, figure) for row in found)])
            tables.append(Table(f"{system}, {figure}", cells))
    return [*tables[:-1], Table(tables[-1].title, tables[-1].cells, f"{_CCC} {_LEGENDS['cross']}")]


def _figure(row: Mapping[str, Any] | None, figure: str) -> str:
    return NONE if row is None else with_interval(row["ccc"][figure], (row["interval"] or {}).get(figure))


def _corpora(table: Mapping[str, Any]) -> Table:
    cells = [["name", "corpus", "labels on", "utterances", "speakers"]]
    for name, each in table["corpora"].items():
        scale = f"{each['scale'][0]:g} to {each['scale'][1]:g}"
        cells.append([name, each["corpus"], scale, str(each["utterances"]), str(each["speakers"])])
    return Table("Corpora", cells)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.0f}"
