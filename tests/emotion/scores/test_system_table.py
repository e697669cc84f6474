import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.ccc_intervals import FIGURES, bootstrap_interval, interval, scores
from cpcscale.emotion.scores.system_table import (
    BASELINE,
    SystemPredictions,
    TableSubject,
    label_correlation,
    published_scores,
    system_table,
)

SPEAKERS, EACH, FOLDS = 7, 5, 3
SUBJECT = TableSubject("tones", "speakers3", (), SPEAKERS * EACH, SPEAKERS)
GROUPS = [f"voice{number % SPEAKERS}" for number in range(SPEAKERS * EACH)]
# Whole speakers, as a protocol has them.
TESTED = [number % SPEAKERS % FOLDS for number in range(SPEAKERS * EACH)]
TRUTH_UP = np.random.default_rng(0).uniform(1, 5, (SPEAKERS * EACH, 3))


def guesses(noise: float, *seeds: int, recalls: tuple[float, ...] = ()) -> SystemPredictions:
    """Predictions as far off the truth as `noise`, drawn anew for each seed."""
    drawn = [
        TRUTH_UP + np.random.default_rng([seed, int(1000 * noise)]).normal(0, noise, TRUTH_UP.shape) for seed in seeds
    ]
    return SystemPredictions(seeds, np.stack(drawn), recalls)


def table(systems: dict[str, SystemPredictions], reference: str = "random", **more):
    return system_table(SUBJECT, TRUTH_UP, GROUPS, TESTED, systems, reference=reference, **more)


FOUR = {
    "mean": SystemPredictions((0,), np.full((1, *TRUTH_UP.shape), 3.0)),
    "random": guesses(3, 0, 1),
    BASELINE: guesses(1, 0),
    "precpc": guesses(0.5, 0, 1, recalls=(0.5, 0.7)),
}


def test_a_row_has_the_pooled_figures_of_its_system_and_what_they_rest_on():
    made = table(FOUR, seed=3)
    assert [row.system for row in made.rows] == list(FOUR)
    for row, each in zip(made.rows, FOUR.values(), strict=True):
        assert row.seeds == list(each.seeds)
        assert row.ccc == scores(TRUTH_UP, each.guess_SUP)
        assert row.interval == interval(TRUTH_UP, each.guess_SUP, GROUPS)
        assert row.bootstrap == bootstrap_interval(TRUTH_UP, each.guess_SUP, GROUPS, seed=3)
        assert (row.seed_deviation is None) == (len(each.seeds) == 1)
    last = made.rows[-1]
    assert last.recall == pytest.approx(0.6)
    assert last.recall_deviation == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert made.rows[0].recall is None


def test_the_mean_of_folds_is_of_each_fold_by_itself():
    (row,) = table({"random": FOUR["random"]}).rows
    folds = np.array(TESTED)
    each = [scores(TRUTH_UP[folds == fold], FOUR["random"].guess_SUP[:, folds == fold]) for fold in range(FOLDS)]
    assert row.ccc_mean_of_folds == pytest.approx({name: np.mean([fold[name] for fold in each]) for name in FIGURES})
    assert row.ccc_mean_of_folds != pytest.approx(row.ccc, abs=1e-4)


def test_the_same_seed_again_makes_nothing_surer():
    once = guesses(1, 4)
    thrice = SystemPredictions((4, 5, 6), np.repeat(once.guess_SUP, 3, axis=0))
    one, three = table({"random": once}).rows[0], table({"random": thrice}).rows[0]
    assert three.ccc == pytest.approx(one.ccc)
    for name in FIGURES:
        assert three.interval[name] == pytest.approx(one.interval[name])
        assert three.bootstrap[name] == pytest.approx(one.bootstrap[name])
        assert three.seed_deviation[name] == pytest.approx(0)


@given(st.permutations(range(len(TRUTH_UP))))
def test_the_order_of_the_utterances_changes_nothing(order):
    moved = {name: SystemPredictions(each.seeds, each.guess_SUP[:, order], each.recalls) for name, each in FOUR.items()}
    groups, folds = [GROUPS[row] for row in order], [TESTED[row] for row in order]
    there = system_table(SUBJECT, TRUTH_UP[order], groups, folds, moved, reference="random")
    here = table(FOUR)
    for one, other in zip(here.rows, there.rows, strict=True):
        assert other.ccc == pytest.approx(one.ccc)
        assert other.interval["mean"] == pytest.approx(one.interval["mean"])
    for one, other in zip(here.tests["random"], there.tests["random"], strict=True):
        assert other.p_holm == pytest.approx(one.p_holm)


def test_every_other_system_is_compared_with_the_reference_and_with_the_classic_one():
    tests = table(FOUR).tests
    firsts = {second: [test.first for test in family] for second, family in tests.items()}
    assert firsts == {"random": ["mean", BASELINE, "precpc"], BASELINE: ["mean", "random", "precpc"]}
    assert list(table(FOUR, reference=BASELINE).tests) == [BASELINE]
    without = {name: each for name, each in FOUR.items() if name != BASELINE}
    assert list(table(without).tests) == ["random"]


def test_a_comparison_is_the_difference_of_two_rows_and_the_other_way_round_its_negative():
    made = table(FOUR)
    of = {row.system: row.ccc for row in made.rows}
    (forward,) = [test for test in made.tests["random"] if test.first == BASELINE]
    (backward,) = [test for test in made.tests[BASELINE] if test.first == "random"]
    for name in FIGURES:
        assert forward.difference[name] == pytest.approx(of[BASELINE][name] - of["random"][name])
        assert backward.difference[name] == pytest.approx(-forward.difference[name])
        assert backward.p[name] == pytest.approx(forward.p[name])


def test_p_is_corrected_over_the_primitives_of_all_systems_of_a_family():
    family = table(FOUR).tests["random"]
    values = [test.p[name] for test in family for name in PRIMITIVES]
    lowest = min(values)
    corrected = [test.p_holm[name] for test in family for name in PRIMITIVES]
    assert min(corrected) == pytest.approx(min(1, 9 * lowest))
    assert all(after >= before for before, after in zip(values, corrected, strict=True))
    means = [test.p["mean"] for test in family]
    assert min(test.p_holm["mean"] for test in family) == pytest.approx(3 * min(means))


def test_a_system_against_its_own_predictions_differs_by_nothing():
    (test,) = table({"random": FOUR["random"], "twin": FOUR["random"]}).tests["random"]
    assert set(test.difference.values()) == {0.0}
    assert test.p_holm == dict.fromkeys(FIGURES, 1.0)


def test_systems_of_other_seeds_and_a_reference_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match=r"differ in their seeds, \[\(0, 1\), \(0, 2\)\]"):
        table(FOUR | {"mfcc": guesses(1, 0, 2)})
    with pytest.raises(ValueError, match="reference='raw' is not among the systems"):
        table(FOUR, reference="raw")
    with pytest.raises(ValueError, match=r"2 sets of predictions do not fit the seeds \[0\]"):
        replace(FOUR["random"], seeds=(0,))


def test_the_correlation_of_the_labels_is_pearsons_and_open_for_a_constant():
    assert np.array(label_correlation(TRUTH_UP)) == pytest.approx(np.corrcoef(TRUTH_UP, rowvar=False))
    flat_UP = TRUTH_UP.copy()
    flat_UP[:, 1] = 2.1
    first, second, third = label_correlation(flat_UP)
    assert second == [None, None, None]
    assert first[1] is None and third[1] is None
    assert first[2] == pytest.approx(np.corrcoef(TRUTH_UP[:, 0], TRUTH_UP[:, 2])[0, 1])


def test_the_table_is_json_whatever_the_predictions():
    made = table({"mean": FOUR["mean"], "random": FOUR["random"]}, published=published_scores("iemocap")).as_dict()
    assert json.loads(json.dumps(made, allow_nan=False))["published"]["ccc"]["precpc"]["valence"] == 0.752


@pytest.mark.parametrize("kind", ["iemocap", "msp-podcast"])
def test_published_figures_are_of_the_papers_corpora_alone_and_agree_with_their_mean(kind):
    ccc = published_scores(kind).ccc["precpc"]
    assert ccc["mean"] == pytest.approx(np.mean([ccc[name] for name in PRIMITIVES]), abs=1e-3)
    assert published_scores("emodb") is None and published_scores("csv") is None
