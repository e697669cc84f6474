"""Statistics of a labelled corpus: labels, speakers, partitions, durations, and agreement of raters.

They cover the utterances that the adapter took. Durations come from the audio headers. Of up to 20 hours all audio is
decoded too, to see whether it is what its header says and whether it can be speech; of more, every n-th file.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from cpcscale import audio, storage
from cpcscale.emotion.audio.labelled_file import UnusableAudio, read_parts
from cpcscale.emotion.corpora.corpus import Corpus, Utterance
from cpcscale.emotion.scores.ccc import PRIMITIVES, ccc
from cpcscale.emotion.scores.system_table import label_correlation
from cpcscale.progress import Progress

# A label within this of the raters' mean is that mean: owners write two to six decimals.
_SAME = 0.01
_PROBES = 8
# So much audio is decoded within a minute or two.
_DECODED_S = 20 * 3600


def describe(corpus: Corpus) -> dict[str, Any]:
    """The statistics as values for JSON; None where there is no figure.

    `labels`, by primitive: see `label_figures`. `correlation`: see `label_correlation`. `speakers`, `gender`,
    `partitions`, `styles`, `sessions`, `categories`, `languages`: number of utterances for each value, "" if unknown.
    `duration_s`: see `durations`. `dropped`: rows left out, by reason. `human`: see `human_ceiling`. `unusable`: see
    `unusable_audio`.
    """
    rows = corpus.utterances
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
        "duration_s": (seconds := durations([row.path for row in rows], [row.segment for row in rows])),
        # Audio in shards was checked when it was packed.
        "unusable": unusable_audio([] if corpus.shards else rows, seconds["total"]),
        "dropped": corpus.dropped_counts,
        "human": human_ceiling(corpus),
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


def durations(paths: Sequence[str], segments: Sequence[tuple[float, float] | None] = ()) -> dict[str, Any]:
    """Durations of audio files in seconds, by their headers: total, mean, least, median, greatest; and `unreadable`.

    `segments` are parts of the files, as (start, end).

    A file that is missing, empty or not audio counts as unreadable. Raises UserError only when a store fails.
    """

    def probed(path: str) -> float:
        try:
            with storage.opened(path) as file:
                return audio.read_header(cast(io.RawIOBase, file)).duration_s
        except (audio.AudioError, storage.NotFoundError):
            return math.nan

    with ThreadPoolExecutor(max_workers=_PROBES) as pool:
        seconds_U = np.array(list(pool.map(probed, paths)), np.float64)
    for row, segment in enumerate(segments):
        if segment:
            seconds_U[row] = np.maximum(np.minimum(seconds_U[row], segment[1]) - segment[0], 0)
    known = seconds_U[~np.isnan(seconds_U)]
    return {
        "total": float(known.sum()),
        "mean": float(known.mean()) if len(known) else None,
        "least": float(known.min()) if len(known) else None,
        "median": float(np.median(known)) if len(known) else None,
        "greatest": float(known.max()) if len(known) else None,
        "unreadable": len(seconds_U) - len(known),
    }


def unusable_audio(utterances: Sequence[Utterance], seconds: float) -> dict[str, Any]:
    """Files that a fine-tuning refuses: `causes` (files by cause), `first` (path and why); `decoded` of `files` tried.

    A file is refused if any of its utterances is. Of a corpus of more than 20 hours (`seconds`), only every n-th file
    is decoded. Raises UserError when a store fails.
    """
    files: dict[str, list[Utterance]] = {}
    for one in utterances:
        files.setdefault(one.path, []).append(one)
    tried = list(files)[:: max(1, math.ceil(seconds / _DECODED_S))]

    def fault(path: str) -> UnusableAudio | None:
        return next((found for _, found in read_parts(files[path]) if isinstance(found, UnusableAudio)), None)

    faults: dict[str, UnusableAudio] = {}
    with ThreadPoolExecutor(max_workers=_PROBES) as pool, Progress("decoding", len(tried), "files") as progress:
        for done, (path, error) in enumerate(zip(tried, pool.map(fault, tried), strict=True), start=1):
            if error:
                faults[path] = error
            progress.update(done)
    first = next(iter(faults), "")
    return {
        "causes": dict(Counter(error.cause for error in faults.values()).most_common()),
        "first": f"{first}: {faults[first].why}" if first else "",
        "decoded": len(tried),
        "files": len(files),
    }


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
