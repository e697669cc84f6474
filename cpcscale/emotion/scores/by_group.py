"""For whom a recogniser works: CCC by gender and by style of speech, and the gaps between groups. Pure.

Figures are those of score.py, of all test predictions of a group pooled. U utterances, S seeds, P primitives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from cpcscale.emotion.corpora.corpus import Utterance
from cpcscale.emotion.scores.ccc_intervals import gap, interval, scores, with_seeds

# What an utterance says of itself by which it is judged apart; "" where the owners do not say.
TRAITS = ("gender", "style")


def traits_of(utterances: Sequence[Utterance]) -> dict[str, list[str]]:
    """The value of each of TRAITS for these utterances."""
    return {trait: [getattr(one, trait) for one in utterances] for trait in TRAITS}


def by_trait(
    truth_UP: np.ndarray, guess: np.ndarray, speakers: Sequence[str], traits: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """For each trait its groups, sorted, the gap between each two of them, and how many rows are `missing` a value.

    {trait: {missing, groups: {name: {utterances, speakers, ccc, interval}}, gaps: [the fields of score.Gap]}}, in plain
    values. An interval is None under 6 speakers; that of a gap under 6 in all or 2 in either group.
    """
    guess_SUP, voices = with_seeds(truth_UP, guess), np.asarray(speakers)
    found = {}
    for trait, values in traits.items():
        labels = np.asarray(values)
        names = sorted(set(values) - {""})
        found[trait] = {
            "missing": int((labels == "").sum()),
            "groups": {name: _group(truth_UP, guess_SUP, voices, labels == name) for name in names},
            "gaps": [_gap(truth_UP, guess_SUP, speakers, values, pair) for pair in combinations(names, 2)],
        }
    return found


def _group(truth_UP: np.ndarray, guess_SUP: np.ndarray, voices: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    truth, guess, names = truth_UP[rows], guess_SUP[:, rows], voices[rows].tolist()
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
    found = dataclasses.asdict(gap(truth_UP, guess_SUP, speakers, values, first=pair[0], second=pair[1]))
    return found | {"speakers": list(found["speakers"])}
