"""Tracked runs side by side: one row of stable keys a run, as a table for people, as JSON or as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from cpcscale.config import read_json
from cpcscale.errors import UserError
from cpcscale.tracking.runs import TrackedRun

PRIMITIVES = ("activation", "valence", "dominance")
FIGURES = (*PRIMITIVES, "mean")
# Shown for a figure that a run does not have.
NONE = "-"
KINDS = ("finetune", "sweep", "pretrain")
TITLES = {"finetune": "Fine-tuned recognisers", "sweep": "Sweeps", "pretrain": "Pretraining"}
INTERVAL_LEGEND = (
    "CCC: concordance correlation pooled over the test folds. [low, high]: its 95 % interval over speakers "
    "(delete-one-speaker jackknife on Fisher z, t with n - 1 degrees of freedom; none below 6 speakers)."
)
SWEEP_LEGEND = (
    "inner_ccc: best mean CCC on development speakers, on which the settings were chosen; it is not a test score."
)
PRETRAIN_LEGEND = (
    "accuracy: share of predictions whose true frame beats every negative, mean over the prediction steps k (a tie "
    "counts as wrong). held-out: on utterances kept out of training. unseen: on voices kept out of training. data "
    "wait: share of the time spent waiting for data."
)
MARKS = {
    "MADE": "speech and labels are synthetic: figures show that the software works, nothing about emotion.",
    "PROXY": "labels are mapped from emotion categories, not rated.",
    "LEAKY": "a test speaker was seen in training.",
    "TRANSDUCTIVE": "unlabelled audio of the test speakers was used in training.",
    "SPEAKER-ADAPTED": "statistics of each test speaker were used.",
    "SELECTED-ON-TEST": "settings or epoch were chosen on the test part.",
}

_COMMON = ("run_id", "name", "kind", "status", "started", "seconds")
_PRETRAIN = ("accuracy_mean", "accuracy_chance", "heldout_accuracy_mean", "unseen_accuracy_mean")
_SPEED = ("audio_s_per_s", "data_wait_share")
_SUBJECT = ("system", "corpus", "protocol", "marks")
_CSV_COLUMNS = (
    *(*_COMMON, *_SUBJECT, "speakers", "utterances"),
    *(f"ccc_{figure}" for figure in FIGURES),
    *(f"interval_{figure}_{end}" for figure in FIGURES for end in ("low", "high")),
    *("inner_ccc", "trials", "steps", "loss", *_PRETRAIN, *_SPEED),
)

Row = dict[str, Any]


def compare_rows(runs: Sequence[TrackedRun]) -> list[Row]:
    """One row a run, in the order given. Figures that a run does not have, or that are not finite, are None.

    All kinds: run_id, name, kind, status, started (ISO 8601, UTC), seconds. finetune: system, corpus, protocol, marks,
    speakers, utterances, `ccc` {activation, valence, dominance, mean}, `interval` (same keys, [low, high]; or None).
    sweep: system, corpus, protocol, marks, trials and `inner_ccc`, never `ccc`. pretrain: steps, loss, accuracy_mean,
    accuracy_chance, heldout_accuracy_mean, unseen_accuracy_mean, audio_s_per_s, data_wait_share.
    """
    return [_row(run) for run in runs]


def result_of(run: TrackedRun) -> dict[str, Any]:
    """The run's `result.json`; empty if it did not finish and has none. Raises UserError for one that is damaged."""
    data = run.artifact("result.json")
    try:
        return read_json(data) if data else {}
    except ValueError as error:
        raise UserError(
            f"result.json of run {run.run_id} is damaged ({error}): delete that run, or run it again"
        ) from None


def format_json(rows: Sequence[Row]) -> str:
    """A JSON list of the rows."""
    return json.dumps(list(rows), indent=2, allow_nan=False)


def format_csv(rows: Sequence[Row]) -> str:
    """One line a run under one header for all kinds; nested keys joined by `_`, marks by a comma."""
    text = io.StringIO()
    table = csv.DictWriter(text, _CSV_COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in rows:
        line = {key: value for key, value in row.items() if key not in ("ccc", "interval", "marks")}
        line |= {f"ccc_{key}": value for key, value in (row.get("ccc") or {}).items()}
        for key, (low, high) in (row.get("interval") or {}).items():
            line |= {f"interval_{key}_low": low, f"interval_{key}_high": high}
        table.writerow(line | ({"marks": ",".join(row["marks"])} if "marks" in row else {}))
    return text.getvalue()


def format_table(rows: Sequence[Row]) -> str:
    """The rows for a terminal: grouped by kind, fine-tunes by corpus and protocol with the best mean CCC first."""
    parts = []
    for kind in KINDS:
        of_kind = sorted((row for row in rows if row["kind"] == kind), key=sort_key)
        if not of_kind:
            continue
        parts.append(TITLES[kind])
        match kind:
            case "finetune":
                for corpus in dict.fromkeys(row["corpus"] for row in of_kind):
                    parts.append(_finetune_table([row for row in of_kind if row["corpus"] == corpus]))
                parts.append(_wrapped(INTERVAL_LEGEND))
            case "sweep":
                parts += [_aligned(of_kind, _SWEEP_CELLS), _wrapped(SWEEP_LEGEND)]
            case "pretrain":
                parts += [_aligned(of_kind, _PRETRAIN_CELLS), _wrapped(PRETRAIN_LEGEND)]
    marks = [f"{mark}: {MARKS[mark]}" for mark in marks_of(rows) if mark in MARKS]
    return "\n\n".join([*parts, *(["\n".join(marks)] if marks else [])]) + "\n"


def sort_key(row: Row) -> tuple[Any, ...]:
    """Fine-tunes by corpus, protocol and falling mean CCC (those without one last); sweeps likewise."""
    figure = row["ccc"]["mean"] if row.get("ccc") else row.get("inner_ccc")
    place = (row.get("corpus") or "", row.get("protocol") or "")
    return (*place, figure is None, -(figure or 0.0))


def marks_of(rows: Sequence[Row]) -> list[str]:
    """The marks that appear in any of the rows."""
    return list(dict.fromkeys(mark for row in rows for mark in row.get("marks", ())))


def short(value: float | None, digits: int = 3) -> str:
    """`.312`, `-.04`, `1.000`: a coefficient or share without its leading zero; a dash for None."""
    if value is None:
        return NONE
    # What is below zero by more than noise keeps its sign where it rounds to zero: an interval may end there.
    text = f"{value if abs(value) >= 0.0005 else 0.0:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def rounded(value: float | None, digits: int = 0) -> str:
    """A number with thousands separated; a dash for None."""
    return NONE if value is None else f"{value:,.{digits}f}"


def finite(value: Any) -> float | None:
    """`value` as a float, or None when there is none or it is NaN or infinite."""
    return float(value) if value is not None and math.isfinite(value) else None


def _row(run: TrackedRun) -> Row:
    row: Row = {"run_id": run.run_id, "name": run.name, "kind": run.kind, "status": run.status}
    row["started"] = datetime.fromtimestamp(run.started_s, UTC).isoformat(timespec="seconds")
    row["seconds"] = round(run.ended_s - run.started_s, 3) if run.ended_s else None
    match run.kind:
        case "finetune":
            result = result_of(run)
            interval = result.get("interval")
            row |= _subject(run) | {key: result.get(key) for key in ("speakers", "utterances")}
            row["ccc"] = {figure: finite(run.metrics.get(f"ccc_{figure}")) for figure in FIGURES}
            row["interval"] = (
                {key: [finite(end) for end in ends] for key, ends in interval.items()} if interval else None
            )
        case "pretrain":
            steps = run.metrics.get("steps", run.steps.get("loss"))
            row |= {"steps": None if steps is None else int(steps), "loss": finite(run.metrics.get("loss"))}
            row |= {key: finite(run.metrics.get(key)) for key in (*_PRETRAIN, *_SPEED)}
            row["accuracy_chance"] = row["accuracy_chance"] or _chance(run)
        case _:
            row |= _subject(run) | {"inner_ccc": finite(run.metrics.get("inner_ccc")), "trials": run.children}
    return row


def _subject(run: TrackedRun) -> Row:
    names: Row = {key: run.tag(key) or None for key in ("system", "corpus", "protocol")}
    return names | {"marks": [mark for mark in run.tag("marks").split(",") if mark]}


def _chance(run: TrackedRun) -> float | None:
    """Accuracy of a guess among the positive and N negatives, from the run's parameters."""
    negatives = next((value for key, value in run.params.items() if key.split(".")[-1] == "negatives"), "")
    return 1 / (int(negatives) + 1) if negatives.isdigit() else None


_Cell = Callable[[Row], str]
_SWEEP_CELLS: dict[str, _Cell] = {
    "system": lambda row: row["system"] or NONE,
    "corpus": lambda row: row["corpus"] or NONE,
    "protocol": lambda row: row["protocol"] or NONE,
    "marks": lambda row: ",".join(row["marks"]) or NONE,
    "inner_ccc": lambda row: short(row["inner_ccc"]),
    "trials": lambda row: rounded(row["trials"]),
    "status": lambda row: row["status"],
    "run": lambda row: row["run_id"][:8],
}
_PRETRAIN_CELLS: dict[str, _Cell] = {
    "name": lambda row: row["name"][:24],
    "steps": lambda row: rounded(row["steps"]),
    "loss": lambda row: rounded(row["loss"], 3),
    "accuracy": lambda row: short(row["accuracy_mean"]),
    "held-out": lambda row: short(row["heldout_accuracy_mean"]),
    "unseen": lambda row: short(row["unseen_accuracy_mean"]),
    "chance": lambda row: short(row["accuracy_chance"]),
    "audio s/s": lambda row: rounded(row["audio_s_per_s"]),
    "data wait": lambda row: NONE if row["data_wait_share"] is None else f"{100 * row['data_wait_share']:.1f} %",
    "status": lambda row: row["status"],
    "run": lambda row: row["run_id"][:8],
}


def _finetune_table(rows: list[Row]) -> str:
    cells: dict[str, _Cell] = {
        "system": lambda row: row["system"] or row["name"],
        "protocol": lambda row: row["protocol"] or NONE,
        "marks": lambda row: ",".join(row["marks"]) or NONE,
    }
    cells |= {figure: _interval_cell(rows, figure) for figure in FIGURES}
    if any(row["status"] != "FINISHED" for row in rows):
        cells["status"] = lambda row: row["status"]
    cells["run"] = lambda row: row["run_id"][:8]
    sizes = {f"{row['speakers']} speakers, {row['utterances']} utterances" for row in rows if row["speakers"]}
    return f"{rows[0]['corpus']} ({' / '.join(sorted(sizes)) or 'sizes not known'})\n" + _aligned(rows, cells)


def _interval_cell(rows: list[Row], figure: str) -> _Cell:
    """A cell such as `.312 [ .21, .41]`, with brackets and commas aligned over the rows."""
    figure_width = max(len(short(row["ccc"][figure])) for row in rows)
    ends = [[short(end, 2) for end in row["interval"][figure]] for row in rows if row["interval"]]
    widths = [max((len(end) for end in column), default=0) for column in zip(*ends, strict=True)] or [0, 0]

    def cell(row: Row) -> str:
        text = short(row["ccc"][figure]).rjust(figure_width)
        if not row["interval"]:
            return text + " " * (sum(widths) + 5 if ends else 0)
        low, high = (short(end, 2).rjust(width) for end, width in zip(row["interval"][figure], widths, strict=True))
        return f"{text} [{low}, {high}]"

    return cell


def _aligned(rows: Sequence[Row], cells: dict[str, _Cell]) -> str:
    """Columns two blanks apart; words to the left, figures to the right."""
    lines = [list(cells), *([cell(row) for cell in cells.values()] for row in rows)]
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    words = {"system", "corpus", "protocol", "marks", "name", "status", "run", *FIGURES}
    align = [str.ljust if name in words else str.rjust for name in cells]
    return "\n".join(
        "  ".join(put(text, width) for put, text, width in zip(align, line, widths, strict=True)).rstrip()
        for line in lines
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110)
