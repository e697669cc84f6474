"""CCC by gender and by style of speech, as lines and as cells of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cpcscale.report.compare import FIGURES, short

LEGEND = (
    "minus: the CCC of the first group minus that of the second, [low, high] its 95 % interval (delete-one-speaker "
    "jackknife of the difference, t with n - 1 degrees of freedom; none below 6 speakers in all or 2 in a group). A "
    "group has an interval from 6 speakers on."
)
SLOPE_LEGEND = (
    "slope: of the regression of the truth on the prediction, mean over seeds. 1: calibrated; below 1: predictions "
    "spread too far; above 1: they stay too close to their mean; 0: they are constant."
)


def trait_lines(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines that `cpcscale finetune` prints of the `groups` of result.json; none for a trait that is not known."""
    for trait, found in groups.items():
        if not found["groups"]:
            continue
        yield f"  by {trait}{_missing(trait, found['missing'])}"
        for name, group in found["groups"].items():
            sizes = f"{group['utterances']:,} utterances of {_speakers(group['speakers'])}"
            yield f"    {name}, {sizes}: {_in_words(group['ccc'], group['interval'])}"
        for gap in found["gaps"]:
            few = "" if gap["interval"] else " (no interval: it needs 6 speakers in all and 2 in each group)"
            yield f"    {_gap_name(gap)}: {_in_words(gap['difference'], gap['interval'], plus=True)}{few}"


def trait_cells(trait: str, systems: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A table of one trait from each system's `groups`, header first; [] if the trait is not known."""
    cells = []
    for system, traits in systems.items():
        found = traits.get(trait, {"groups": {}, "gaps": []})
        for name, group in found["groups"].items():
            sizes = [str(group["utterances"]), str(group["speakers"])]
            cells.append([system, name, *sizes, *_figures(group["ccc"], group["interval"])])
        for gap in found["gaps"]:
            cells.append([system, _gap_name(gap), "", "", *_figures(gap["difference"], gap["interval"], plus=True)])
    return [["system", trait, "utterances", "speakers", *FIGURES], *cells] if cells else []


def missing_words(trait: str, systems: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on the utterances that are in no group; empty if all are in one."""
    count = max((traits.get(trait, {"missing": 0})["missing"] for traits in systems.values()), default=0)
    return f" {count:,} utterances without a {trait} are in no group." if count else ""


def signed(value: float, digits: int = 3) -> str:
    """`short`, with a plus for what is not negative."""
    text = short(value, digits)
    return text if text.startswith("-") else f"+{text}"


def _missing(trait: str, count: int) -> str:
    return f" ({count:,} utterances without a {trait} are in no group)" if count else ""


def _speakers(count: int) -> str:
    return f"{count:,} speaker" if count == 1 else f"{count:,} speakers"


def _gap_name(gap: Mapping[str, Any]) -> str:
    return f"{gap['first']} minus {gap['second']}"


def _in_words(ccc: Mapping[str, float], interval: Mapping[str, Any] | None, plus: bool = False) -> str:
    return ", ".join(f"{name} {text}" for name, text in zip(FIGURES, _figures(ccc, interval, plus), strict=True))


def _figures(ccc: Mapping[str, float], interval: Mapping[str, Any] | None, plus: bool = False) -> list[str]:
    return [with_interval(ccc[name], (interval or {}).get(name), plus) for name in FIGURES]


def with_interval(value: float, bounds: Any, plus: bool = False) -> str:
    """`.612 [.55, .67]`, or the value alone without bounds; `plus` gives it a sign, for differences."""
    text = signed(value) if plus else short(value)
    return f"{text} [{short(bounds[0], 2)}, {short(bounds[1], 2)}]" if bounds else text
