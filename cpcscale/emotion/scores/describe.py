"""Statistics of a labelled corpus: labels, speakers, partitions, durations, and agreement of raters.

They cover the utterances that the adapter took; the account covers every file in the folder of the corpus. Durations
come from the audio headers. Of up to 20 hours all audio is decoded too, to see whether it is what its header says and
whether it can be speech; of more, every n-th file.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from cpcscale import audio, storage
from cpcscale.emotion.audio.labelled_file import UnusableAudio, read_parts
from cpcscale.emotion.corpora.corpus import Corpus, Utterance, is_file
from cpcscale.emotion.scores.ccc import PRIMITIVES, ccc
from cpcscale.emotion.scores.system_table import label_correlation
from cpcscale.progress import Progress
from cpcscale.shards.account import Account, suffix

# A label within this of the raters' mean is that mean: owners write two to six decimals.
_SAME = 0.01
_PROBES = 8
# Files that may be labels.
_TEXTS = (".csv", ".tsv", ".json", ".jsonl", ".txt")
# So much audio is decoded within a minute or two.
_DECODED_S = 20 * 3600


def describe(corpus: Corpus, folder: str = "") -> dict[str, Any]:
    """The statistics as values for JSON; None where there is no figure. `folder` is that of the corpus.

    `labels`, by primitive: see `label_figures`. `correlation`: see `label_correlation`. `speakers`, `gender`,
    `partitions`, `styles`, `sessions`, `categories`, `languages`: number of utterances for each value, "" if unknown.
    `duration_s`: see `durations`. `dropped`: rows left out, by reason. `human`: see `human_ceiling`. `unusable`: see
    `unusable_audio`. `account`: what became of the audio of the corpus, see `shards.account`; None for audio in shards.
    """
    rows = corpus.utterances
    # Audio in shards was checked when it was packed.
    files = [] if corpus.shards else list(dict.fromkeys(row.path for row in rows))
    unused, passed_over = ([], Counter[str]()) if corpus.shards else _unused(folder, {*files})
    lengths = header_lengths([*(files or dict.fromkeys(row.path for row in rows)), *unused])
    seconds = durations(lengths, [(row.path, row.segment) for row in rows])
    undecoded, decoded = decoding_faults([] if corpus.shards else rows, seconds["total"])
    faults = {
        path: error for path in files if isinstance(error := undecoded.get(path, lengths[path]), audio.AudioError)
    }
    speakers = Counter(row.speaker for row in rows)
    unknown = speakers.pop("", 0)
    return {
        "corpus": corpus.name,
        "marks": list(corpus.marks),
        "notes": list(corpus.notes),
        "digest": corpus.digest,
        "scale": list(corpus.scale),
        "utterances": len(rows),
        "labels": {name: label_figures(corpus.labels_UP[:, at], corpus.scale) for at, name in enumerate(PRIMITIVES)},
        "correlation": label_correlation(corpus.labels_UP),
        "out_of_scale": int(corpus.outside_U.sum()),
        "speakers": dict(sorted(speakers.items())),
        "unknown_speaker": unknown,
        "recordings": len({row.recording for row in rows if row.recording}),
        "gender": _counts(row.gender for row in rows),
        "partitions": _counts(row.partition for row in rows),
        "styles": _counts(row.style for row in rows),
        "sessions": _counts(row.session for row in rows),
        "categories": _counts(row.category for row in rows),
        "languages": _counts(row.language for row in rows),
        "duration_s": seconds,
        "unusable": unusable_audio(faults, decoded, len(files)),
        "dropped": corpus.dropped_counts,
        "human": human_ceiling(corpus),
        "account": None if corpus.shards else _account(corpus, lengths, faults, unused, passed_over).values(),
    }


def label_figures(labels_U: np.ndarray, scale: tuple[float, float]) -> dict[str, Any]:
    """Moments of one primitive's labels, float64 [U] in the corpus's units, and a histogram over the stated scale.

    `deviation` is that of the population; `skewness` and `excess_kurtosis` are None for constant labels. Bins are half
    a unit wide on a scale of up to 10 whole units, else a tenth of the scale. A bin includes its lower edge, the last
    bin both.
    """
    least, greatest = scale
    span = greatest - least
    bins = int(2 * span) if span == int(span) and span <= 10 else 10
    edges = np.linspace(least, greatest, bins + 1)
    counts, _ = np.histogram(labels_U, edges)
    mean, deviation = float(labels_U.mean()), float(labels_U.std())
    varies = np.ptp(labels_U) > 0
    standard_U = (labels_U - mean) / deviation if varies else np.zeros_like(labels_U)
    return {
        "mean": mean,
        "deviation": deviation,
        "skewness": float((standard_U**3).mean()) if varies else None,
        "excess_kurtosis": float((standard_U**4).mean()) - 3 if varies else None,
        "least": float(labels_U.min()),
        "median": float(np.median(labels_U)),
        "greatest": float(labels_U.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "below_scale": int((labels_U < least).sum()),
        "above_scale": int((labels_U > greatest).sum()),
    }


def header_lengths(paths: Iterable[str]) -> dict[str, float | audio.AudioError]:
    """The seconds of each audio file by its header, or why it has none. Raises UserError only when a store fails."""

    def probed(path: str) -> float | audio.AudioError:
        try:
            with storage.opened(path) as file:
                return audio.read_header(cast(io.RawIOBase, file)).duration_s
        except audio.AudioError as error:
            return error
        except storage.NotFoundError as error:
            return audio.AudioError("missing", str(error))

    names = list(paths)
    with ThreadPoolExecutor(max_workers=_PROBES) as pool:
        return dict(zip(names, pool.map(probed, names), strict=True))


def durations(
    lengths: Mapping[str, float | audio.AudioError], parts: Iterable[tuple[str, tuple[float, float] | None]]
) -> dict[str, Any]:
    """Durations of utterances in seconds: total, mean, least, median, greatest; and how many are `unreadable`.

    `lengths` are those of the files; an utterance is a file, or the part from start to end of it.
    """
    seconds: list[float] = []
    for path, part in parts:
        length = lengths[path]
        if isinstance(length, audio.AudioError):
            seconds.append(math.nan)
        else:
            seconds.append(max(min(length, part[1]) - part[0], 0.0) if part else length)
    seconds_U = np.array(seconds, np.float64)
    known = seconds_U[~np.isnan(seconds_U)]
    return {
        "total": float(known.sum()),
        "mean": float(known.mean()) if len(known) else None,
        "least": float(known.min()) if len(known) else None,
        "median": float(np.median(known)) if len(known) else None,
        "greatest": float(known.max()) if len(known) else None,
        "unreadable": len(seconds_U) - len(known),
    }


def decoding_faults(utterances: Sequence[Utterance], seconds: float) -> tuple[dict[str, audio.AudioError], int]:
    """(why each file that a fine-tuning refuses is refused, how many were decoded).

    A file is refused if any of its utterances is. Of a corpus of more than 20 hours (`seconds`), only every n-th file
    is decoded. Raises UserError when a store fails.
    """
    files: dict[str, list[Utterance]] = {}
    for one in utterances:
        files.setdefault(one.path, []).append(one)
    tried = list(files)[:: max(1, math.ceil(seconds / _DECODED_S))]

    def fault(path: str) -> audio.AudioError | None:
        bad = next((found for _, found in read_parts(files[path]) if isinstance(found, UnusableAudio)), None)
        return audio.AudioError(bad.cause, bad.why, bad.seconds) if bad else None

    faults: dict[str, audio.AudioError] = {}
    with ThreadPoolExecutor(max_workers=_PROBES) as pool, Progress("decoding", len(tried), "files") as progress:
        for done, (path, error) in enumerate(zip(tried, pool.map(fault, tried), strict=True), start=1):
            if error:
                faults[path] = error
            progress.update(done)
    return faults, len(tried)


def unusable_audio(faults: Mapping[str, audio.AudioError], decoded: int, files: int) -> dict[str, Any]:
    """Files that a fine-tuning refuses: `causes` (files by cause), `first` (path and why); `decoded` of `files`."""
    first = next(iter(faults), "")
    return {
        "causes": dict(Counter(error.cause for error in faults.values()).most_common()),
        "first": f"{first}: {faults[first]}" if first else "",
        "decoded": decoded,
        "files": files,
    }


def _unused(folder: str, used: Collection[str]) -> tuple[list[str], Counter[str]]:
    """(the audio files in the folder that are no utterance's, how many other files there are by suffix).

    Tables and texts, which may be labels, are not counted.
    """
    if not folder or is_file(folder):
        return [], Counter()
    names = storage.list_files(folder)
    unused = [storage.join(folder, name) for name in names if name.lower().endswith(audio.SUFFIXES)]
    others = Counter(map(suffix, names))
    return [path for path in unused if path not in used], Counter(
        {name: count for name, count in others.items() if name not in (*audio.SUFFIXES, *_TEXTS)}
    )


def _account(
    corpus: Corpus,
    lengths: Mapping[str, float | audio.AudioError],
    faults: Mapping[str, audio.AudioError],
    unused: Sequence[str],
    passed_over: Counter[str],
) -> Account:
    """What became of the audio files of a corpus: taken, unusable, dropped by the adapter, or named by no row."""
    account = Account(passed_over=passed_over)
    taken, parts = 0, dict[str, list[tuple[float, float]]]()
    for row in corpus.utterances:
        parts.setdefault(row.path, []).append(row.segment or (0.0, math.inf))
    taken_s = 0.0
    for path, each in parts.items():
        length = lengths[path]
        if path in faults:
            known = None if isinstance(length, audio.AudioError) else length
            seconds = faults[path].seconds
            account.leave_out(faults[path].cause, known if seconds is None else seconds)
        elif not isinstance(length, audio.AudioError):
            taken, inside = taken + 1, _covered(each, length)
            taken_s += inside
            if inside < length:
                account.left_out.setdefault("in no row", [0, 0.0])[1] += length - inside
    # Adapters drop files by their path in the folder, or by their name.
    why = {one.key: one.why for one in corpus.dropped}
    for path in unused:
        length = lengths[path]
        known = length.seconds if isinstance(length, audio.AudioError) else length
        place = next((path[at + 1 :] for at in _slashes(path) if path[at + 1 :] in why), "")
        account.leave_out(why.get(place, "in no row"), known)
    account.taken = taken, taken_s
    account.found = len(parts) + len(unused), taken_s + account.left_out_s
    return account


def _slashes(path: str) -> Iterator[int]:
    return (at for at, letter in enumerate(path) if letter == "/")


def _covered(parts: Iterable[tuple[float, float]], length: float) -> float:
    """How many of `length` seconds lie in one of the parts, (start, end) each."""
    covered = end = 0.0
    for start, stop in sorted(parts):
        stop = min(stop, length)
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def human_ceiling(corpus: Corpus) -> dict[str, Any] | None:
    """Agreement of one rater with the others: the leave-one-rater-out CCC of each primitive. None without ratings.

    Each rating is paired with the mean of the other raters of that utterance; the CCC is over all pairs of all raters
    and utterances pooled. Only utterances with at least `others` other raters are used: 2, or 1 if fewer than half of
    the rated utterances have three raters (as in IEMOCAP). `pairs` is their number. Self-reports are not used. A model
    may score above this figure, because it is scored against the mean of all raters, which varies less than one rater.

    `label_is_mean` is the share of rated utterances whose label is the mean of their ratings to 0.01: near 1 if the
    owners average, low if columns are mixed up.
    """
    found = [(at, *one[1:4]) for at, row in enumerate(corpus.utterances) for one in row.ratings if not one.self_report]
    if not found:
        return None
    table = np.array(found, np.float64)
    at_R, values_RP = table[:, 0].astype(int), table[:, 1:]
    given_RP = ~np.isnan(values_RP)
    values_RP = np.where(given_RP, values_RP, 0)
    sums_UP, counts_UP = np.zeros_like(corpus.labels_UP), np.zeros(corpus.labels_UP.shape, int)
    np.add.at(sums_UP, at_R, values_RP)
    np.add.at(counts_UP, at_R, given_RP)
    raters_U = np.bincount(at_R, minlength=len(corpus.utterances))
    rated = int((raters_U > 0).sum())
    others = 2 if 2 * int((raters_U >= 3).sum()) >= rated else 1
    figures: dict[str, Any] = {"ccc": {}, "pairs": {}, "label_is_mean": {}}
    for column, name in enumerate(PRIMITIVES):
        values_R, sums_U, counts_U = values_RP[:, column], sums_UP[:, column], counts_UP[:, column]
        left_R = counts_U[at_R] - 1
        pairs = given_RP[:, column] & (left_R >= others)
        rest = (sums_U[at_R] - values_R)[pairs] / left_R[pairs]
        figures["ccc"][name] = float(ccc(values_R[pairs], rest)) if pairs.any() else None
        figures["pairs"][name] = int(pairs.sum())
        some = counts_U > 0
        same = np.abs(sums_U[some] / counts_U[some] - corpus.labels_UP[some, column]) <= _SAME
        figures["label_is_mean"][name] = float(same.mean()) if some.any() else None
    return figures | {
        "others": others,
        "raters": len({one.rater for row in corpus.utterances for one in row.ratings if not one.self_report}),
        "rated_utterances": rated,
        "raters_an_utterance": len(found) / rated,
    }


def _counts(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))
