"""What `cpcscale corpus describe` prints, from the same values as its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from cpcscale.shards import account

_LISTED = 12
_BAR = 16
_COLUMN = 12


def corpus_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `emotion.scores.describe.describe`: speakers, labels, agreement of raters, and problems last."""
    least, greatest = values["scale"]
    marks = f" [{', '.join(values['marks'])}]" if values["marks"] else ""
    yield (
        f"{values['corpus']}{marks}: {values['utterances']:,} utterances, {values['duration_s']['total'] / 3600:,.2f} "
        f"h, {len(values['speakers']):,} speakers, labels on {least:g} to {greatest:g}, digest {values['digest'][:12]}"
    )
    yield _line("speakers", _speakers(values["speakers"], values["unknown_speaker"]))
    for name in ("gender", "languages", "partitions", "sessions", "styles", "categories"):
        yield _line(name, _counts(values[name]))
    yield _line("recordings", f"{values['recordings']:,}" if values["recordings"] else "not given")
    yield _line("durations", _durations(values["duration_s"]))
    yield ""
    yield from _moments(values["labels"])
    yield ""
    yield from _histograms(values["labels"])
    yield ""
    yield from _correlations(list(values["labels"]), values["correlation"])
    yield ""
    yield from _ceiling(values["human"])
    yield ""
    yield _line("outside", _outside(values["out_of_scale"], values["labels"], least, greatest))
    yield _line("left out", _counts(values["dropped"]) if values["dropped"] else "none")
    if values["unusable"]["files"]:
        yield _line("audio", _unusable(values["unusable"]))
    yield from (_line("note", note) for note in values["notes"])
    if values["account"]:
        yield from account.lines(values["account"])


def _speakers(by_speaker: Mapping[str, int], unknown: int) -> str:
    """Each speaker with its utterances if there are few, else the range of utterances a speaker."""
    texts = []
    if by_speaker:
        each = sorted(by_speaker.values())
        even = f"{each[0]:,} to {each[-1]:,} utterances each, median {median(each):,.10g}"
        few = len(by_speaker) <= _LISTED
        texts.append(f"{len(by_speaker):,}: {_counts(by_speaker) if few else even}")
    if unknown or not by_speaker:
        texts.append(f"{unknown:,} utterances of unknown speakers")
    return "; ".join(texts)


def _durations(seconds: Mapping[str, Any]) -> str:
    if seconds["mean"] is None:
        return f"unknown: no audio header of {seconds['unreadable']:,} can be read"
    text = "{least:.2f} s to {greatest:.2f} s, median {median:.2f} s, mean {mean:.2f} s".format(**seconds)
    return text + (f"; {seconds['unreadable']:,} files cannot be read" if seconds["unreadable"] else "")


def _unusable(found: Mapping[str, Any]) -> str:
    tried = f"{found['decoded']:,} of {found['files']:,} files decoded"
    if not found["causes"]:
        return f"{tried}: all can be used"
    return f"{tried}: {_counts(found['causes'])} cannot be used, the first {found['first']}"


def _moments(labels: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    names = ("mean", "deviation", "skewness", "excess_kurtosis", "least", "median", "greatest")
    yield _row("labels", [name.replace("excess_kurtosis", "kurtosis - 3") for name in names])
    for primitive, figures in labels.items():
        yield _row(f"  {primitive}", [_figure(figures[name]) for name in names])


def _histograms(labels: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A row a bin and a column a primitive; the longest bar is the fullest bin of all three."""
    tables = [figures["histogram"] for figures in labels.values()]
    edges = tables[0]["edges"]
    most = max(1, *(count for table in tables for count in table["counts"]))
    cells = [f"{name:>8}".ljust(9 + _BAR) for name in labels]
    yield _line("histogram", " ".join(cells).rstrip())
    for at in range(len(edges) - 1):
        counts = [table["counts"][at] for table in tables]
        # A bin with an utterance has a bar of at least one character.
        bars = ["#" * max(round(_BAR * count / most), count > 0) for count in counts]
        cells = [f"{count:>8,} {bar:{_BAR}}" for count, bar in zip(counts, bars, strict=True)]
        yield _line(f"  {edges[at]:g} - {edges[at + 1]:g}", " ".join(cells).rstrip())


def _correlations(names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> Iterator[str]:
    yield _row("correlation", names)
    for name, row in zip(names, matrix, strict=True):
        yield _row(f"  {name}", [_figure(value) for value in row])


def _ceiling(human: Mapping[str, Any] | None) -> Iterator[str]:
    if human is None:
        yield _line("human", "agreement not known: the corpus has no ratings of single raters")
        return
    yield _row("human", list(human["ccc"]))
    yield _row("  CCC", [_figure(value) for value in human["ccc"].values()])
    yield _row("  pairs", [f"{count:,}" for count in human["pairs"].values()])
    yield _line("", "each rating against the mean of the utterance's other raters, all pairs pooled (leave one rater")
    others = "1 other" if human["others"] == 1 else f"{human['others']} others"
    yield _line("", f"out; at least {others}); a model is scored against the mean of all raters, and can score higher")
    each, rated = f"{human['raters_an_utterance']:.1f} an utterance", f"{human['rated_utterances']:,} rated utterances"
    yield _line("", f"{human['raters']:,} raters, {each}, of {rated}; self-reports do not count")
    same = ", ".join(f"{name} {_share(value)}" for name, value in human["label_is_mean"].items())
    yield _line("", f"share of labels that equal the mean of their ratings to 0.01: {same}")


def _outside(count: int, labels: Mapping[str, Mapping[str, Any]], least: float, greatest: float) -> str:
    if not count:
        return f"no label is outside {least:g} to {greatest:g}"
    parts = [
        f"{name} {figures['below_scale']:,} below and {figures['above_scale']:,} above"
        for name, figures in labels.items()
        if figures["below_scale"] or figures["above_scale"]
    ]
    return f"{count:,} utterances have a label outside {least:g} to {greatest:g}, used as it is: {', '.join(parts)}"


def _counts(by_name: Mapping[str, int]) -> str:
    """The names with their counts; utterances without a name come last, as `not given`."""
    if set(by_name) <= {""}:
        return "not given"
    known = [f"{name} ({count:,})" for name, count in by_name.items() if name]
    more = [f"and {len(known) - _LISTED:,} more"] if len(known) > _LISTED else []
    unknown = [f"not given ({by_name['']:,})"] if "" in by_name else []
    return ", ".join([*known[:_LISTED], *more, *unknown])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _figure(value: float | None) -> str:
    # Adding 0.0 turns a negative zero into zero.
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"


def _row(name: str, cells: Sequence[str]) -> str:
    return _line(name, " ".join(f"{cell:>{_COLUMN}}" for cell in cells))


def _line(name: str, text: str) -> str:
    return f"  {name:14} {text}"
