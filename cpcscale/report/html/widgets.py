"""HTML building blocks of the page: style, tables, figures and foldable parts, independent of runs.

Arguments named `markup` are HTML and are put in as they are; all other text is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --faint: #6b7785; --line: #e3e7eb; --tint: #f6f8fa; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 48px clamp(16px, 4vw, 40px) 96px; }
h1, h2 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; font-weight: 600;
  letter-spacing: -.01em; line-height: 1.15; text-wrap: balance; }
h1 { font-size: clamp(30px, 4.5vw, 44px); margin: 0 0 12px; }
h2 { font-size: clamp(24px, 3vw, 30px); margin: 0 0 6px; }
h3 { font-size: 16px; margin: 36px 0 6px; }
p { margin: 0 0 12px; max-width: 75ch; }
a { color: #00568a; text-underline-offset: 3px; }
section { border-top: 1px solid var(--line); margin-top: 56px; padding-top: 40px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 20px; font-size: 15px; }
.eyebrow { margin: 0 0 8px; color: var(--faint); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; }
.lead { color: var(--soft); }
.note { border-left: 3px solid #e69f00; padding: 2px 0 2px 14px; margin: 16px 0; }
.mark { display: inline-block; padding: 0 8px; border: 1px solid #e5c678; border-radius: 99px; background: #fff6de;
  color: #6b4300; font-size: 11.5px; font-weight: 700; letter-spacing: .05em; line-height: 19px; vertical-align: 1px; }
.scroll { overflow-x: auto; margin: 16px 0 8px; }
table { border-collapse: collapse; min-width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 16px 8px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: baseline; }
th { color: var(--soft); font-size: 13px; font-weight: 600; line-height: 1.3; vertical-align: bottom;
  border-bottom-color: #b9c2cb; }
th.figure, td.figure { text-align: right; }
td.figure { white-space: nowrap; }
.dense { font-size: 13.5px; }
.dense th, .dense td { padding: 5px 12px 5px 0; }
.dense td { white-space: nowrap; }
tr > :last-child, .dense tr > :last-child { padding-right: 0; }
tbody tr:hover td { background: var(--tint); }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; white-space: nowrap; }
.interval { color: var(--faint); font-size: 13px; font-weight: 400; white-space: nowrap; margin-left: 4px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
figure { margin: 28px 0 0; }
figcaption, .caption { color: var(--soft); font-size: 14px; max-width: 88ch; margin-top: 8px; }
.grid { display: grid; gap: 16px 20px; grid-template-columns: repeat(auto-fill, minmax(min(var(--least), 100%), 1fr)); }
.row-name { margin: 18px 0 4px; font-size: 14px; color: var(--soft); }
svg.plot { display: block; width: 100%; height: auto; }
svg.plot text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
details { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: 10px 0; }
summary > * { margin-left: 10px; }
summary .soft { color: var(--faint); font-size: 14px; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 4px 0 16px; font-size: 14.5px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.params { columns: 340px; column-gap: 40px; margin: 0 0 20px; padding: 14px 16px; background: var(--tint);
  border-radius: 8px; font: 12.5px/1.7 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.params div { break-inside: avoid; overflow-wrap: anywhere; }
.params span { color: var(--faint); }
@media (max-width: 640px) { main { padding-top: 28px; } section { margin-top: 40px; padding-top: 28px; }
  .pairs { grid-template-columns: 1fr 1fr; gap: 12px 8px; } .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: 8px; } }
@media print { details > * { display: block; } section { break-inside: avoid-page; } }
"""


def escape(text: object) -> str:
    """`text` with its HTML characters escaped, for any place in the page."""
    return html.escape(str(text))


def document(title: str, markup: str) -> str:
    """A whole page. Its security policy forbids every load, so that the browser keeps it self-contained."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{markup}</main>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, markup: str) -> str:
    """A part of the page with a heading that links can reach."""
    return f'<section id="{escape(anchor)}">\n<h2>{escape(title)}</h2>\n{markup}</section>\n'


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", words: int = 1, dense: bool = False
) -> str:
    """Rows of cell markup; the first `words` columns hold words, the others figures."""
    kinds = ["" if place < words else ' class="figure"' for place in range(len(columns))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    body = "\n".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    note = f'<p class="caption">{escape(caption)}</p>\n' if caption else ""
    kind = ' class="dense"' if dense else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>\n{note}"
    )


def figure(drawings: Sequence[tuple[str, Sequence[str]]], caption: str, *, least_px: int, pairs: bool = False) -> str:
    """Grids of plots, each below its name if it has one; `pairs` keeps two plots in a row on a phone."""
    grids = "".join(
        (f'<p class="row-name">{escape(name)}</p>' if name else "")
        + f'<div class="grid{" pairs" if pairs else ""}" style="--least: {least_px}px">{"".join(plots)}</div>\n'
        for name, plots in drawings
    )
    return f"<figure>\n{grids}<figcaption>{escape(caption)}</figcaption>\n</figure>\n"


def folded(summary_markup: str, markup: str, *, opened: bool = False) -> str:
    """A part of the page that opens on a click on its summary."""
    return f"<details{' open' if opened else ''}><summary>{summary_markup}</summary>\n{markup}</details>\n"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and values; those with an empty value are left out."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs if value)
    return f'<dl class="facts">{items}</dl>\n'


def mark(text: str) -> str:
    """A mark, such as MADE or PROXY, as a badge."""
    return f'<span class="mark">{escape(text)}</span>'
