"""What `cpcscale recogniser` prints, from the same values as its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cpcscale import storage
from cpcscale.report.terminal.traits import with_interval


def show_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `recogniser show`."""
    scores = values["scores"]
    low, high = values["scale"]
    yield f"recogniser  {storage.shown(values['path'])}, {values['bytes'] / 1e6:.1f} MB"
    yield f"model       {values['digest'][:16]}, its name in what it predicts"
    yield f"system      {values['system']}, head {values['head']}, {values['parameters']:,} numbers"
    yield f"values      activation, valence and dominance from {low:g} to {high:g}"
    learnt = scores["learnt_from"]
    yield f"learnt from {scores['corpus']}: {learnt['utterances']:,} utterances of {learnt['speakers']} speakers"
    yield f"marks       {' '.join(scores['marks']) or 'none'}"
    interval = scores["interval"] or {}
    figures = (
        f"{name} {with_interval(value, interval[name]) if name in interval else f'{value:.3f}'}"
        for name, value in scores["ccc"].items()
    )
    yield f"CCC         {', '.join(figures)}"
    yield f"            of the procedure that made it, under {scores['protocol']}, on speakers that it did not know"
    if values["classes"]:
        yield f"categories  {', '.join(values['classes'])}"
    if (found := values["intervals"]) is None:
        yield "intervals   none: they need 4 speakers by whom nothing was learnt or chosen"
        return
    halves = (
        f"{name} +-{half:.2f}{'' if found['informative'][name] else ' (uninformative)'}"
        for name, half in found["half_width"].items()
    )
    yield f"intervals   {found['level']:.0%}, approximate: {', '.join(halves)}"


def verify_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `recogniser verify`."""
    place = storage.shown(values["path"])
    yield f"verified the recogniser at {place}, every byte: {'whole' if values['ok'] else 'torn'}"
    yield from (f"  {problem}" for problem in values["problems"])
