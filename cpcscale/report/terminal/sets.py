"""What `cpcscale pack`, `index` and `audit` print, from the same values as their JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpcscale import storage
from cpcscale.shards import account
from cpcscale.shards.adoption.adopt import QUARANTINE, AdoptedSet
from cpcscale.shards.pack import PackedSets

_NAMES, _COPIES = 6, 3


def pack_values(packed: PackedSets) -> dict[str, Any]:
    """The values of `cpcscale pack --json` beside the target: what each set holds, and what was left out."""
    return {
        "sets": {
            name: {
                "shards": index.shards.num_rows,
                "utterances": index.count,
                "hours": round(index.duration_s / 3600, 4),
                "fingerprint": index.fingerprint,
            }
            for name, index in packed.splits.items()
        },
        "quarantined": packed.files_left_out + packed.pieces_left_out,
        "account": packed.account.values(),
    }


def pack_lines(values: Mapping[str, Any], target: str) -> Iterator[str]:
    """The lines that `cpcscale pack` prints, from `pack_values`."""
    for name, row in values["sets"].items():
        yield (
            f"  {name:8} {row['shards']:4} shards {row['utterances']:7} utterances {row['hours']:9.2f} h  "
            f"fingerprint {row['fingerprint'][:12]}"
        )
    yield from (f"  {line}" for line in account.lines(values["account"]))
    if values["quarantined"]:
        yield f"  what was left out, and why: {storage.join(target, 'quarantine.csv')}"


def index_values(adopted: AdoptedSet) -> dict[str, Any]:
    """The values of `cpcscale index --json`: what the index holds, and what was done."""
    index = adopted.index
    return {
        "shards": index.base,
        "state": adopted.state,
        "fingerprint": index.fingerprint,
        "parent": index.lineage[-1].fingerprint if index.lineage else None,
        "tars": index.shards.num_rows,
        "new_tars": adopted.new_shards,
        "utterances": index.count,
        "hours": index.duration_s / 3600,
        "excluded": len(index.excluded),
        "left_out": dict(adopted.left_out),
        "damaged_tars": list(adopted.damaged),
        "groups_from": _found(adopted.origins, "group"),
        "languages_from": _found(adopted.origins, "language"),
        "notes": dict(adopted.notes),
        "account": adopted.account.values() if adopted.state in ("made", "appended") else None,
    }


def index_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines that `cpcscale index` prints, from `index_values`."""
    place = storage.shown(values["shards"])
    done = {
        "made": f"indexed {place}",
        "appended": f"appended {values['new_tars']} tars to {place}",
        "excluded": f"excluded utterances of {place}",
        "unchanged": f"the index of {place} is up to date",
    }[values["state"]]
    yield (
        f"{done}: {values['tars']:,} tars, {values['utterances']:,} utterances, {values['hours']:,.2f} h, "
        f"fingerprint {values['fingerprint'][:12]}"
    )
    if values["parent"]:
        yield _line("parent", values["parent"][:12])
    for name in ("groups", "languages"):
        if values[f"{name}_from"]:
            yield _line(name, "from " + _counts(values[f"{name}_from"]))
    if values["excluded"]:
        yield _line("excluded", f"{values['excluded']:,} utterances keep their place, but runs do not use them")
    if values["state"] in ("made", "appended"):
        left_out = values["left_out"]
        where = f" ({_counts(left_out)}), listed in {storage.join(place, QUARANTINE)}" if left_out else ""
        yield _line("left out", f"{sum(left_out.values()):,} members{where}")
    if values["damaged_tars"]:
        yield _line("damaged", f"{_some(values['damaged_tars'])} left out whole: see {storage.join(place, QUARANTINE)}")
    for line in account.lines(values["account"], "members") if values["account"] else ():
        yield _line("audio", line)
    for note, count in values["notes"].items():
        yield _line("note", f"{count:,} {note}")


def audit_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines that `cpcscale audit` prints, problems last."""
    yield (
        f"audited {storage.shown(values['shards'])}: {values['tars']:,} tars, {values['utterances']:,} utterances, "
        f"{values['hours']:,.2f} h, {values['bytes'] / 1e9:,.2f} GB, fingerprint {values['fingerprint'][:12]}"
    )
    yield _line("checked", f"every byte; {values['decoded']:,} members decoded (share={values['share']:g})")
    if values["duration_s"]:
        yield _line("durations", "{least:.2f} s to {most:.2f} s, median {median:.2f} s".format(**values["duration_s"]))
    yield _line("languages", _hours(values["hours_by_language"], values["languages"], values["hours"]))
    alone = values["hours_without_group"]
    others = f"; {alone:,.2f} h without a group (each recording is its own)" if alone else ""
    yield _line("groups", _hours(values["hours_by_group"], values["groups"], values["hours_of_groups"]) + others)
    yield _line("recordings", f"{values['recordings']:,}")
    copies, first = values["duplicates"]["utterances"], values["duplicates"]["first"][:_COPIES]
    yield _line(
        "duplicates", f"{copies:,} utterances have the same bytes as another one, such as" if copies else "none"
    )
    yield from (f"    {' = '.join(group[:2])}" for group in first)
    if values["excluded"]:
        yield _line("excluded", f"{values['excluded']:,} utterances, {values['excluded_hours']:,.2f} h")
    if values["members_not_indexed"]:
        yield _line("not indexed", f"{values['members_not_indexed']:,} audio members of indexed tars")
    if values["tars_not_indexed"]:
        yield _line("not indexed", f"{values['tars_not_indexed']:,} tars of this folder")
    yield _line("shuffle", _shuffle(values["shuffle"]))
    yield _line("problems", f"{values['problem_count']:,}" if values["problem_count"] else "none")
    yield from (f"    {problem}" for problem in values["problems"])


def _found(origins: Counter[str], field: str) -> dict[str, int]:
    """Where a field was found, with counts, the most frequent first."""
    start = f"{field}: "
    return {name.removeprefix(start): count for name, count in origins.most_common() if name.startswith(start)}


def _line(name: str, text: str) -> str:
    return f"  {name:11} {text}"


def _counts(by_name: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in by_name.items())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _hours(by_name: Mapping[str, float], total: int, hours: float) -> str:
    """The number of names; the first ones with their hours, and the rest of `total` names and `hours` in one."""
    shown = list(by_name.items())[:_NAMES]
    texts = [f"{name or 'none named'} {value:,.2f} h" for name, value in shown]
    others = total - sum(bool(name) for name, _ in shown)
    more = [f"{others:,} more {hours - sum(value for _, value in shown):,.2f} h"] if others else []
    return f"{total:,}" + (f": {', '.join([*texts, *more])}" if texts else "")


def _shuffle(figure: Mapping[str, Any]) -> str:
    plan = f"batch {figure['batch']}, {figure['lanes']} lanes, {figure['window']}"
    if "why" in figure:
        return f"not measured ({plan}): {figure['why']}"
    ratio = "" if figure["ratio"] is None else f", ratio {figure['ratio']:.2f}"
    how = f"all {figure['batches']}" if figure["exact"] else f"{figure['batches']} random"
    error = "" if figure["exact"] else f" +- {figure['error']:.2g}"
    return (
        f"{figure['pairs']:.3g}{error} pairs from one recording a batch, {figure['perfect']:.3g} in a perfect shuffle"
        f"{ratio} ({how} batches; {plan})"
    )
