"""What the runs of an evaluation come to: a row for each system and condition, share, or pair of corpora."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.corpora.joined import joined_key
from cpcscale.emotion.finetune_result import FinetuneResult
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.protocol.splits import share_marks
from cpcscale.emotion.scores.ccc_intervals import ccc_change, interval, scores
from cpcscale.experiments.many_runs import FinetuneRun, UtterancePrediction, predictions

CLEAN = "clean"


def table_of(
    kind: str,
    corpora: Mapping[str, Corpus],
    runs: Sequence[FinetuneRun],
    points: Mapping[str, Any],
    done: Mapping[str, FinetuneResult],
) -> dict[str, Any]:
    """{kind, protocol, marks, corpora, rows} in plain values.

    `points` says what each run is a figure of, by its name. A row has `system`, `seeds`, `at` (its place in words),
    `utterances`, `speakers`, `ccc` and its `interval`, each figure the mean over seeds; of robustness also `change`
    from the clean figure and `change_interval`; of learning `share` and `labelled`, the mean over folds of the
    utterances that a fold is trained and chosen by; of cross `train` and `test`.
    """
    heard = {run.name: dict(predictions(done[run.name].predictions_csv)) for run in runs}
    rows: list[dict[str, Any]] = []
    for mine in _same(runs, points):
        point, said = points[mine[0].name], [heard[run.name] for run in mine]
        match kind:
            case "robustness":
                rows += _robustness(mine, said)
            case "learning":
                folds = done[mine[0].name].folds
                labelled = float(np.mean([fold["train_utterances"] + fold["dev_utterances"] for fold in folds]))
                figures = _figures(mine, said, _judged(mine[0], said))
                rows.append(figures | {"at": f"{point:g}", "share": point, "labelled": labelled})
            case _:
                rows += _cross(mine, said, point, corpora)
    rows.sort(key=lambda row: [run.config.system for run in runs].index(row["system"]))
    plain = [run for run in runs if run.config.protocol.split == runs[0].config.protocol.split]
    return {
        "kind": kind,
        "protocol": done[runs[0].name].protocol,
        "marks": list(dict.fromkeys(mark for run in plain for mark in _marks(run, done[run.name]))),
        "corpora": {name: _subject(corpus) for name, corpus in corpora.items()},
        "rows": rows,
    }


def _marks(run: FinetuneRun, result: FinetuneResult) -> list[str]:
    """Those of a result but for its share, which the table shows."""
    return [mark for mark in result.marks if mark not in share_marks(run.config.protocol.train_share)]


def _subject(corpus: Corpus) -> dict[str, Any]:
    return {
        "corpus": corpus.name,
        "scale": list(corpus.scale),
        "utterances": len(corpus.utterances),
        "speakers": len(set(corpus.speakers) - {""}),
    }


def _same(runs: Sequence[FinetuneRun], points: Mapping[str, Any]) -> Iterator[list[FinetuneRun]]:
    """The runs that differ in their seeds alone."""
    groups: dict[tuple[str, Any], list[FinetuneRun]] = {}
    for run in runs:
        groups.setdefault((run.config.system, points[run.name]), []).append(run)
    yield from groups.values()


def _judged(run: FinetuneRun, said: Sequence[Mapping[str, UtterancePrediction]]) -> list[str]:
    """The utterances that every seed tested, under `official` those of the owner's first test part, sorted."""
    keys = set.intersection(*(set(each) for each in said))
    if run.config.protocol.split == "official":
        parts = {one.key: one.partition for one in run.corpus.utterances}
        first = min(parts[key] for key in keys)
        keys = {key for key in keys if parts[key] == first}
    return sorted(keys)


def _figures(
    runs: Sequence[FinetuneRun],
    said: Sequence[Mapping[str, UtterancePrediction]],
    keys: Sequence[str],
    condition: str = "",
) -> dict[str, Any]:
    truth_UP, guess_SUP, voices = _arrays(runs[0], said, keys, condition)
    return {
        "system": runs[0].config.system,
        "seeds": [run.config.seed for run in runs],
        "utterances": len(keys),
        "speakers": len(set(voices)),
        "ccc": scores(truth_UP, guess_SUP),
        "interval": interval(truth_UP, guess_SUP, voices),
    }


def _arrays(
    run: FinetuneRun, said: Sequence[Mapping[str, UtterancePrediction]], keys: Sequence[str], condition: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(truth_UP, guess_SUP, the voice of each row)."""
    groups = fold_splits(run.config, run.corpus).groups
    voices = {one.key: group for one, group in zip(run.corpus.utterances, groups, strict=True)}
    truth_UP = np.stack([said[0][key].truth_P for key in keys])
    guess_SUP = np.stack([np.stack([each[key].guess_P[condition] for key in keys]) for each in said])
    return truth_UP, guess_SUP, [voices[key] for key in keys]


def _robustness(
    runs: Sequence[FinetuneRun], said: Sequence[Mapping[str, UtterancePrediction]]
) -> Iterator[dict[str, Any]]:
    keys = _judged(runs[0], said)
    yield _figures(runs, said, keys) | {"at": CLEAN, "change": None, "change_interval": None}
    truth_UP, clean_SUP, voices = _arrays(runs[0], said, keys, "")
    for condition in runs[0].config.test_conditions:
        difference, bounds = ccc_change(truth_UP, clean_SUP, _arrays(runs[0], said, keys, condition)[1], voices)
        place = {"at": condition, "change": difference, "change_interval": bounds}
        yield _figures(runs, said, keys, condition) | place


def _cross(
    runs: Sequence[FinetuneRun],
    said: Sequence[Mapping[str, UtterancePrediction]],
    point: tuple[str, str | None],
    corpora: Mapping[str, Corpus],
) -> Iterator[dict[str, Any]]:
    train, test = point
    for name in [test] if test else [each for each in corpora if each != train]:
        if test:
            keys = _judged(runs[0], said)
        else:
            own = (joined_key(name, one.key) for one in corpora[name].utterances)
            keys = sorted(key for key in own if all(key in each for each in said))
        yield _figures(runs, said, keys) | {"at": f"{train} to {name}", "train": train, "test": name}
