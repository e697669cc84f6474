"""What `cpcscale evaluate` prints and writes: degraded audio, fewer labels, other corpora, several encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpcscale.report.compare import FIGURES, NONE, short
from cpcscale.report.terminal.tables import Table, mark_notes, markdown, text_lines
from cpcscale.report.terminal.traits import LEGEND, missing_words, trait_cells, with_interval

PAGE, CURVES = "results.md", "curves.png"
_TITLES = {
    "robustness": "Trained on clean audio, tested on degraded",
    "learning": "Trained on a share of the labels",
    "cross": "Trained on one corpus, tested on another",
    "encoders": "Encoders and classic systems",
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
    "encoders": (
        "A + D: the mean CCC of activation and dominance. recall: unweighted average recall of the categories, from "
        "the same features. seeds: how many predictions the figures are means of: pretrainings, or untrained networks."
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
    """results.md, and curves.png for robustness and learning."""
    page = {PAGE: markdown(*_parts(table)).encode()}
    if table["kind"] in ("cross", "encoders"):
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
        case "encoders":
            tables = [*_by_corpus(table), *map(_test, table["tests"]), *_encoders(table), _corpora(table)]
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


def _by_corpus(table: Mapping[str, Any]) -> Iterator[Table]:
    for corpus in table["corpora"]:
        rows = [row for row in table["rows"] if row["corpus"] == corpus]
        cells = [["system", "encoder", "seeds", *FIGURES, "A + D", "recall"]]
        for row in rows:
            figures = [with_interval(row["ccc"][name], (row["interval"] or {}).get(name)) for name in FIGURES]
            also = [short(row["activation_dominance"]), short(row["recall"])]
            cells.append([row["shown"], row["encoder"] or NONE, str(len(row["seeds"])), *figures, *also])
        yield Table(corpus, cells, f"{_CCC} {_LEGENDS['encoders']}")
        groups = {f"{row['shown']} {row['encoder']}".strip(): row["groups"] for row in rows}
        for trait in dict.fromkeys(trait for each in groups.values() for trait in each):
            # A single group has the figures of the table above.
            if all(len(each[trait]["groups"]) < 2 for each in groups.values()):
                continue
            if cells := trait_cells(trait, groups):
                yield Table(f"{corpus}, by {trait}", cells, LEGEND + missing_words(trait, groups))


def _test(judged: Mapping[str, Any]) -> Table:
    cells = [["", "difference", *FIGURES, "A + D"]]
    for test in judged["tests"]:
        row = [test["hypothesis"], f"{test['first']} - {test['second']}"]
        for name in (*FIGURES, "activation_dominance"):
            p = test["p_holm"][name] if test["p_holm"] else test["p"][name]
            bounds = (test["interval"] or {}).get(name)
            row.append(
                f"{with_interval(test['difference'][name], bounds, True)} p {'<.001' if p < 0.001 else short(p)}"
            )
        cells.append(row)
    some, corpora = judged["tests"][0], ", ".join(judged["corpora"])
    deciding = "the mean" if judged["deciding"] == "mean" else "A + D, for these labels are stand-ins"
    verdict = {
        "better": "better than the classic features: H1 and H2 hold",
        "an addition": "an addition to the classic features: of the hypotheses only H3 decides, and holds",
        "neither": "not shown to be better than the classic features, nor to add to them",
        None: "not judged, for a hypothesis was not tested",
    }[judged["verdict"]]
    legend = (
        f"By {deciding}: {verdict}. Difference of CCCs (mean over corpora of the CCC pooled in each) with its 95 % "
        "interval (jackknife over speakers, by corpus), and p by swapping the two systems' predictions for whole "
        f"speakers, within their corpus ({some['speakers']} speakers, {'all' if some['exact'] else 'random'}: "
        f"{some['assignments']:,} assignments); p of H1 to H3 after Holm's correction over the three. Both take the "
        "fitted recognisers as fixed: another training set could change more."
    )
    return Table(f"{judged['encoder']} on {corpora}", cells, legend)


def _encoders(table: Mapping[str, Any]) -> Iterator[Table]:
    cells = [["encoder", "parameters", "pretrainings", "updates", "hours of audio"]]
    for name, each in table["encoders"].items():
        updates = ", ".join(NONE if value is None else f"{value:,}" for value in dict.fromkeys(each["updates"]))
        hours = ", ".join(NONE if value is None else f"{value:.1f}" for value in dict.fromkeys(each["hours"]))
        cells.append([name, f"{each['parameters']:,}", str(len(each["urls"])), updates, hours])
    cells += [[name, "not run", why, "", ""] for name, why in table["not_run"].items()]
    yield Table("Encoders", cells, "Hours of audio: what the updates were computed on, repetitions included.")


def _corpora(table: Mapping[str, Any]) -> Table:
    cells = [["name", "corpus", "labels on", "utterances", "speakers"]]
    for name, each in table["corpora"].items():
        scale = f"{each['scale'][0]:g} to {each['scale'][1]:g}"
        cells.append([name, each["corpus"], scale, str(each["utterances"]), str(each["speakers"])])
    return Table("Corpora", cells)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.0f}"
