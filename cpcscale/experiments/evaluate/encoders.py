"""Whether an encoder is better than classic features: paired tests over all corpora of an evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.scores.paired import TESTED, Pair, PairedTest, holm, paired_test_over
from cpcscale.experiments.evaluate.table import Predictions, arrays, by_seed, compared_keys
from cpcscale.experiments.many_runs import FinetuneRun

ENCODER, CLASSIC, BOTH = "precpc", "functionals", "functionals+prosody"
# What is asked of each encoder, as (name, first system, second system). Holm's correction is over these three.
HYPOTHESES = (
    ("H1", ENCODER, CLASSIC),
    ("H2", ENCODER, BOTH),
    ("H3", f"{ENCODER}+{BOTH}", BOTH),
)
# Shown beside them: what pretraining brings to the same network.
CONTROL = ("", ENCODER, "random")
# By which figure a family of corpora decides. Stand-in labels (PROXY) say little on valence.
DECIDING = {"rated": "mean", "proxy": "activation_dominance"}
LEVEL = 0.05
# (system, corpus, encoder), and what `arrays` gives of its runs.
_Side: TypeAlias = tuple[str, str, str]
_Arrays: TypeAlias = tuple[np.ndarray, np.ndarray, list[str]]


def encoder_tests(
    corpora: Mapping[str, Corpus],
    runs: Sequence[FinetuneRun],
    points: Mapping[str, Any],
    by_run: Predictions,
    seed: int,
) -> list[dict[str, Any]]:
    """For each encoder and family of corpora: {encoder, family, corpora, deciding, tests, verdict} in plain values.

    `tests` has HYPOTHESES whose systems were run, and CONTROL: {hypothesis, first, second, p_holm} with the fields of
    PairedTest; `p_holm` is None for the control. `verdict` is "better" if H1 and H2 hold by the `deciding` figure, "an
    addition" if only H3 does, else "neither"; None where a hypothesis was not tested. `seed` keys the random swaps.
    """
    keys = {corpus: compared_keys(corpus, runs, points, by_run) for corpus in corpora}
    sides = {
        (group[0].config.system, *points[group[0].name]): arrays(
            group[0], [by_run[run.name] for run in group], keys[points[group[0].name][0]]
        )
        for group in by_seed(runs, points)
    }
    families: dict[str, list[str]] = {}
    for name, corpus in corpora.items():
        families.setdefault("proxy" if "PROXY" in corpus.marks else "rated", []).append(name)
    encoders = list(dict.fromkeys(encoder for _, encoder in points.values() if encoder))
    found = []
    for encoder in encoders:
        for family, names in families.items():
            tests: dict[tuple[str, str, str], PairedTest] = {}
            for asked in (*HYPOTHESES, CONTROL):
                pairs = [_pair(sides, name, encoder, asked) for name in names]
                if (whole := [pair for pair in pairs if pair]) and len(whole) == len(names):
                    tests[asked] = paired_test_over(whole, seed=seed)
            if tests:
                found.append({"encoder": encoder, "family": family, "corpora": names} | judged(tests, family))
    return found


def judged(tests: Mapping[tuple[str, str, str], PairedTest], family: str) -> dict[str, Any]:
    """What `encoder_tests` says of the tests of one encoder and family."""
    figure = DECIDING[family]
    asked = [each for each in HYPOTHESES if each in tests]
    by_figure = {name: holm([tests[each].p[name] for each in asked]) for name in TESTED}
    rows = []
    for each, test in tests.items():
        corrected = {name: by_figure[name][asked.index(each)] for name in TESTED} if each in asked else None
        names = {"hypothesis": each[0], "first": each[1], "second": each[2]}
        rows.append(names | dataclasses.asdict(test) | {"p_holm": corrected})
    holds = {
        row["hypothesis"]: row["difference"][figure] > 0 and row["p_holm"][figure] <= LEVEL
        for row in rows
        if row["p_holm"]
    }
    verdict = None
    if len(asked) == len(HYPOTHESES):
        verdict = "better" if holds["H1"] and holds["H2"] else "an addition" if holds["H3"] else "neither"
    return {"deciding": figure, "tests": rows, "verdict": verdict}


def _pair(sides: Mapping[_Side, _Arrays], corpus: str, encoder: str, asked: tuple[str, str, str]) -> Pair | None:
    """The predictions of both systems on the corpus; None where one was not run."""
    first, second = (sides.get((system, corpus, encoder)) or sides.get((system, corpus, "")) for system in asked[1:])
    if first is None or second is None:
        return None
    (truth_UP, first_SUP, speakers), (_, second_SUP, _) = first, second
    # Three pretrainings against five untrained networks: each figure is a mean over seeds, so repeating both is fair.
    count = math.lcm(len(first_SUP), len(second_SUP))
    first_SUP, second_SUP = (np.tile(each, (count // len(each), 1, 1)) for each in (first_SUP, second_SUP))
    return Pair(truth_UP, first_SUP, second_SUP, speakers)
