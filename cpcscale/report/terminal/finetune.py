"""What `cpcscale finetune` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cpcscale.report.terminal.traits import trait_lines


def finetune_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines that `cpcscale finetune` prints, from result.json."""
    marks = f" [{', '.join(result['marks'])}]" if result["marks"] else ""
    official = len(result["ccc_by_part"]) > 0
    scored = f"tested on the owner's {next(iter(result['ccc_by_part']))}" if official else "pooled over the test folds"
    system = result.get("shown") or result["system"]
    yield f"{system} on {result['corpus']}{marks}, protocol {result['protocol']}, {scored}"
    unknown = f", {result['unknown']:,} utterances of unknown speakers in the corpus" if result["unknown"] else ""
    yield f"  {result['utterances']:,} utterances of {result['speakers']:,} speakers{unknown}"
    for name, value in result["ccc"].items():
        interval = (result["interval"] or {}).get(name)
        yield f"  CCC {name:10} {_figure(value)}" + (f"  [{', '.join(map(_figure, interval))}]" if interval else "")
    if result["interval"] is None:
        yield "  no intervals: they need at least 6 speakers"
    for part, figures in list(result["ccc_by_part"].items())[1:]:
        yield f"  {part}: " + ", ".join(f"{name} {_figure(value)}" for name, value in figures.items())
    slopes = result["agreement"]["slope"].items()
    yield "  calibration slope " + ", ".join(f"{name} {_figure(value)}" for name, value in slopes if name != "mean")
    yield from trait_lines(result["groups"])
    if result["recall"] is not None:
        yield f"  unweighted average recall of the categories {_figure(result['recall'])}"
    if result["dropped"]:
        yield "  left out: " + ", ".join(f"{count:,} {why}" for why, count in result["dropped"].items())


def _figure(value: float) -> str:
    # Adding 0.0 turns a negative zero, the score of a constant prediction, into zero.
    return f"{round(value, 3) + 0.0:.3f}"
