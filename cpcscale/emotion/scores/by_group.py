"""CCC by gender and by style of speech, and the gaps between these groups. Pure.

The figures are those of scores/ccc_intervals.py, over all test predictions of a group pooled. U utterances, S seeds, P
primitives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from cpcscale.emotion.corpora.corpus import Utterance
from cpcscale.emotion.scores.ccc_intervals import ccc_gap, interval, scores, with_seeds

# The fields of an utterance by which scores are grouped; "" means unknown.
TRAITS = ("gender", "style")


def traits_of(utterances: Sequence[Utterance]) -> dict[str, list[str]]:
    """For each of TRAITS its value for each utterance."""
    return {trait: [getattr(one, trait) for one in utterances] for trait in TRAITS}


def by_trait(
    truth_UP: np.ndarray, guess: np.ndarray, speakers: Sequence[str], traits: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The scores of each trait's groups, sorted by name, and the gap between each two groups, in plain values.

    {trait: {missing, groups: {name: {utterances, speakers, ccc, interval}}, gaps: [the fields of ScoreGap]}}; `missing`
    counts the rows without a value. An interval is None under 6 speakers, and that of a gap under 6 in all or 2 in
    either group.
    """
    guess_SUP, names_U = with_seeds(truth_UP, guess), np.asarray(speakers)
    found = {}
    for trait, values in traits.items():
        labels = np.asarray(values)
        names = sorted(set(values) - {""})
        found[trait] = {
            "missing": int((labels == "").sum()),
            "groups": {name: _group(truth_UP, guess_SUP, names_U, labels == name) for name in names},
            "gaps": [_gap(truth_UP, guess_SUP, speakers, values, pair) for pair in combinations(names, 2)],
        }
    return found


def _group(truth_UP: np.ndarray, guess_SUP: np.ndarray, names_U: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    truth, guess, names = truth_UP[rows], guess_SUP[:, rows], names_U[rows].tolist()
    return {
        "utterances": len(names),
        "speakers": len(set(names)),
        "ccc": scores(truth, guess),
        "interval": interval(truth, guess, names),
    }


def _gap(
    truth_UP: np.ndarray,
    guess_SUP: np.ndarray,
    speakers: Sequence[str],
    values: Sequence[str],
    pair: tuple[str, str],
) -> dict[str, Any]:
    found = dataclasses.asdict(ccc_gap(truth_UP, guess_SUP, speakers, values, first=pair[0], second=pair[1]))
    return found | {"speakers": list(found["speakers"])}
