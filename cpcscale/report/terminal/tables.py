"""Tables with a title and a legend, as text for a terminal and as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from cpcscale.report.compare import MARKS

_WIDTH = 110


@dataclass(frozen=True)
class Table:
    """A title, rows of cells with the header first, and a sentence on how to read it."""

    title: str
    cells: list[list[str]]
    legend: str = ""


def text_lines(head: str, tables: Sequence[Table], notes: Sequence[str]) -> list[str]:
    """The lines of `head`, the tables and then the notes."""
    lines = [head]
    for table in tables:
        lines += ["", table.title, *_aligned(table.cells)]
        lines += textwrap.wrap(table.legend, _WIDTH)
    notes_lines = [line for note in notes for line in textwrap.wrap(note, _WIDTH)]
    return lines + (["", *notes_lines] if notes_lines else [])


def markdown(head: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
    """The same as Markdown."""
    parts = [f"# {head}"]
    for table in tables:
        parts += [f"## {table.title}", "\n".join(_piped(table.cells)), *([table.legend] if table.legend else [])]
    return "\n\n".join([*parts, *notes]) + "\n"


def mark_notes(marks: Sequence[str]) -> list[str]:
    """A sentence on the meaning of each mark."""
    return [f"{mark}: {MARKS[mark]}" for mark in marks if mark in MARKS]


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(text) for text in column) for column in zip(*cells, strict=True)]
    lines = [[text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    return ["  " + "  ".join([raw[0].ljust(widths[0]), *line[1:]]) for raw, line in zip(cells, lines, strict=True)]


def _piped(cells: list[list[str]]) -> list[str]:
    head, *rest = (f"| {' | '.join(line)} |" for line in cells)
    return [head, "|---" + "|---:" * (len(cells[0]) - 1) + "|", *rest]
