"""The table of an evaluation: a row for each system and condition, share, pair of corpora, or encoder and corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.corpora.joined import joined_key
from cpcscale.emotion.finetune_result import FinetuneResult
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.protocol.splits import share_marks
from cpcscale.emotion.scores.by_group import by_trait, traits_of
from cpcscale.emotion.scores.ccc_intervals import ccc_change, interval, scores
from cpcscale.experiments.many_runs import FinetuneRun, UtterancePrediction

CLEAN = "clean"
# By the name of a run, its predictions by utterance.
Predictions: TypeAlias = Mapping[str, Mapping[str, UtterancePrediction]]


def evaluation_table(
    kind: str,
    corpora: Mapping[str, Corpus],
    runs: Sequence[FinetuneRun],
    points: Mapping[str, Any],
    done: Mapping[str, FinetuneResult],
    by_run: Predictions,
) -> dict[str, Any]:
    """{kind, protocol, marks, corpora, rows} in plain values.

    By the run's name, `points` gives the point of the table that each run belongs to, and `by_run` its predictions. A
    row has `system`, `seeds`, `at` (the point in words), `utterances`, `speakers`, `ccc` and its `interval`, as means
    over seeds. robustness adds `change` (CCC minus the clean CCC) and `change_interval`; learning adds `share` and
    `labelled` (utterances in the training and development part of a fold, mean over folds); cross adds `train` and
    `test`. encoders adds `corpus`, `encoder` ("": none), `activation_dominance` (their mean), `recall` and `groups`
    (see scores/by_group.py).
    """
    rows: list[dict[str, Any]] = []
    for group in by_seed(runs, points):
        point, predicted = points[group[0].name], [by_run[run.name] for run in group]
        match kind:
            case "robustness":
                found = list(_robustness(group, predicted))
            case "learning":
                folds = done[group[0].name].folds
                labelled = float(np.mean([fold["train_utterances"] + fold["dev_utterances"] for fold in folds]))
                figures = _figures(group, predicted, tested_keys(group[0], predicted))
                found = [figures | {"at": f"{point:g}", "share": point, "labelled": labelled}]
            case "encoders":
                found = [_encoder(group, predicted, compared_keys(point[0], runs, points, by_run), point, done)]
            case _:
                found = list(_cross(group, predicted, point, corpora))
        # As the runs were: a library that came later would give another kind of features.
        rows += [row | {"shown": done[group[0].name].shown or row["system"]} for row in found]
    rows.sort(key=lambda row: [run.config.system for run in runs].index(row["system"]))
    same_split = [run for run in runs if run.config.protocol.split == runs[0].config.protocol.split]
    return {
        "kind": kind,
        "protocol": done[runs[0].name].protocol,
        "marks": list(dict.fromkeys(mark for run in same_split for mark in _marks(run, done[run.name]))),
        "corpora": {name: _subject(corpus) for name, corpus in corpora.items()},
        "rows": rows,
    }


def _marks(run: FinetuneRun, result: FinetuneResult) -> list[str]:
    """The marks of a result, without that of its share, which the table shows."""
    return [mark for mark in result.marks if mark not in share_marks(run.config.protocol.train_share)]


def _subject(corpus: Corpus) -> dict[str, Any]:
    return {
        "corpus": corpus.name,
        "scale": list(corpus.scale),
        "utterances": len(corpus.utterances),
        "speakers": len(set(corpus.speakers) - {""}),
    }


def by_seed(runs: Sequence[FinetuneRun], points: Mapping[str, Any]) -> Iterator[list[FinetuneRun]]:
    """Groups of runs that differ only in the seed."""
    groups: dict[tuple[str, Any], list[FinetuneRun]] = {}
    for run in runs:
        groups.setdefault((run.config.system, points[run.name]), []).append(run)
    yield from groups.values()


def tested_keys(run: FinetuneRun, predicted: Sequence[Mapping[str, UtterancePrediction]]) -> list[str]:
    """The keys of the utterances that every seed tested, sorted; under `official` only those of the first test part."""
    keys = set.intersection(*(set(each) for each in predicted))
    if run.config.protocol.split == "official":
        parts = {one.key: one.partition for one in run.corpus.utterances}
        first = min(parts[key] for key in keys)
        keys = {key for key in keys if parts[key] == first}
    return sorted(keys)


def _figures(
    runs: Sequence[FinetuneRun],
    predicted: Sequence[Mapping[str, UtterancePrediction]],
    keys: Sequence[str],
    condition: str = "",
) -> dict[str, Any]:
    truth_UP, guess_SUP, speakers = arrays(runs[0], predicted, keys, condition)
    return {
        "system": runs[0].config.system,
        "seeds": [run.config.seed for run in runs],
        "utterances": len(keys),
        "speakers": len(set(speakers)),
        "ccc": scores(truth_UP, guess_SUP),
        "interval": interval(truth_UP, guess_SUP, speakers),
    }


def arrays(
    run: FinetuneRun, predicted: Sequence[Mapping[str, UtterancePrediction]], keys: Sequence[str], condition: str = ""
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(truth_UP, guess_SUP, the speaker group of each utterance)."""
    groups = fold_splits(run.config, run.corpus).groups
    speakers = {one.key: group for one, group in zip(run.corpus.utterances, groups, strict=True)}
    truth_UP = np.stack([predicted[0][key].truth_P for key in keys])
    guess_SUP = np.stack([np.stack([each[key].guess_P[condition] for key in keys]) for each in predicted])
    return truth_UP, guess_SUP, [speakers[key] for key in keys]


def compared_keys(
    corpus: str,
    runs: Sequence[FinetuneRun],
    points: Mapping[str, Any],
    by_run: Predictions,
) -> list[str]:
    """The keys of the utterances of a corpus that every run on it tested."""
    of_corpus = [run for run in runs if points[run.name][0] == corpus]
    return tested_keys(of_corpus[0], [by_run[run.name] for run in of_corpus])


def _encoder(
    runs: Sequence[FinetuneRun],
    predicted: Sequence[Mapping[str, UtterancePrediction]],
    keys: Sequence[str],
    point: tuple[str, str],
    done: Mapping[str, FinetuneResult],
) -> dict[str, Any]:
    corpus, encoder = point
    found = _figures(runs, predicted, keys)
    ccc, recalls = found["ccc"], [done[run.name].recall for run in runs]
    utterances = {one.key: one for one in runs[0].corpus.utterances}
    return found | {
        "at": f"{encoder} on {corpus}" if encoder else f"on {corpus}",
        "corpus": corpus,
        "encoder": encoder,
        "activation_dominance": (ccc["activation"] + ccc["dominance"]) / 2,
        "recall": None if None in recalls else float(np.mean([value for value in recalls if value is not None])),
        "groups": by_trait(*arrays(runs[0], predicted, keys), traits_of([utterances[key] for key in keys])),
    }


def _robustness(
    runs: Sequence[FinetuneRun], predicted: Sequence[Mapping[str, UtterancePrediction]]
) -> Iterator[dict[str, Any]]:
    keys = tested_keys(runs[0], predicted)
    yield _figures(runs, predicted, keys) | {"at": CLEAN, "change": None, "change_interval": None}
    truth_UP, clean_SUP, speakers = arrays(runs[0], predicted, keys, "")
    for condition in runs[0].config.test_conditions:
        difference, bounds = ccc_change(truth_UP, clean_SUP, arrays(runs[0], predicted, keys, condition)[1], speakers)
        place = {"at": condition, "change": difference, "change_interval": bounds}
        yield _figures(runs, predicted, keys, condition) | place


def _cross(
    runs: Sequence[FinetuneRun],
    predicted: Sequence[Mapping[str, UtterancePrediction]],
    point: tuple[str, str | None],
    corpora: Mapping[str, Corpus],
) -> Iterator[dict[str, Any]]:
    train, test = point
    for name in [test] if test else [each for each in corpora if each != train]:
        if test:
            keys = tested_keys(runs[0], predicted)
        else:
            own = (joined_key(name, one.key) for one in corpora[name].utterances)
            keys = sorted(key for key in own if all(key in each for each in predicted))
        yield _figures(runs, predicted, keys) | {"at": f"{train} to {name}", "train": train, "test": name}
