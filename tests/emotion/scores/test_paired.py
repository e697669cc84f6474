from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.emotion.scores.ccc_intervals import FIGURES, ccc_change, scores
from cpcscale.emotion.scores.paired import DRAWS, EXACT_SPEAKERS, Pair, corrected, holm, paired_test, paired_test_over

PRIMITIVES = FIGURES[:3]


def two_systems(
    speakers: int, seeds: int, *, rows: int = 8, better: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Truth [U, 3], and predictions [S, U, 3] of two systems whose errors are partly the speaker's."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(3, 1, (speakers * rows, 3))
    made = []
    for noise in (0.9 - better, 0.9):
        own = np.repeat(rng.normal(0, noise / 2, (speakers, 3)), rows, axis=0)
        made.append(0.6 * truth + own + rng.normal(0, noise, (seeds, *truth.shape)))
    return truth, made[0], made[1], [f"v{number:02}" for number in range(speakers) for _ in range(rows)]


def all_figures(truth: np.ndarray, guess: np.ndarray) -> list[float]:
    found = scores(truth, guess)
    return [*found.values(), (found["activation"] + found["dominance"]) / 2]


@pytest.mark.parametrize("seeds", [1, 3])
def test_p_is_the_share_of_all_swaps_written_out(seeds):
    truth, first, second, speakers = two_systems(7, seeds, better=0.2)
    names = np.array(speakers)

    def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        both = [np.mean([list(all_figures(truth, each)) for each in of_system], axis=0) for of_system in (one, other)]
        return both[0] - both[1]

    seen = difference(first, second)
    reached = np.zeros(5)
    for swap in product([False, True], repeat=7):
        rows = np.isin(names, np.unique(names)[list(swap)])[None, :, None]
        reached += np.abs(difference(np.where(rows, second, first), np.where(rows, first, second))) >= abs(seen) - 1e-10
    found = paired_test(truth, first, second, speakers)
    assert (found.speakers, found.assignments, found.exact, found.least_p) == (7, 128, True, 2 / 128)
    assert list(found.p.values()) == pytest.approx(reached / 128)
    assert list(found.difference.values()) == pytest.approx(seen)


@given(st.integers(1, 9), st.integers(0, 1000), st.randoms())
def test_p_depends_neither_on_the_order_of_rows_nor_on_which_system_is_first(speakers, seed, shuffler):
    truth, first, second, names = two_systems(speakers, 2, rows=3, seed=seed)
    order = list(range(len(truth)))
    shuffler.shuffle(order)
    found = paired_test(truth, first, second, names)
    other = paired_test(truth[order], second[:, order], first[:, order], [names[row] for row in order])
    assert other.p == pytest.approx(found.p)
    assert other.difference == pytest.approx({name: -value for name, value in found.difference.items()})
    assert all(found.least_p <= p <= 1 for p in found.p.values())


def test_alike_systems_have_p_one_and_a_clear_winner_the_least_p():
    truth, first, _, speakers = two_systems(8, 1)
    assert set(paired_test(truth, first, first, speakers).p.values()) == {1.0}
    winner = paired_test(truth, truth, first, speakers)
    assert set(winner.p.values()) == {winner.least_p} == {2 / 256}


def test_without_a_difference_p_is_at_or_under_a_level_no_more_often_than_the_level_says():
    ps = np.array([paired_test(*two_systems(8, 1, rows=5, seed=seed)).p["valence"] for seed in range(300)])
    for level in (0.05, 0.2, 0.5):
        assert (ps <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / 300)
    assert (ps <= 0.5).mean() > 0.35


def test_beyond_the_exact_number_of_speakers_random_swaps_say_nearly_the_same(monkeypatch):
    truth, first, second, speakers = two_systems(12, 2, better=0.05, seed=3)
    exact = paired_test(truth, first, second, speakers)
    monkeypatch.setattr("cpcscale.emotion.scores.paired.EXACT_SPEAKERS", 11)
    drawn = paired_test(truth, first, second, speakers)
    assert exact.exact and not drawn.exact and drawn.assignments == DRAWS
    assert 0.02 < exact.p["mean"] < 0.98  # else the next line would say little
    assert drawn.p == pytest.approx(exact.p, abs=0.015)
    assert (
        drawn
        == paired_test(truth, first, second, speakers, seed=0)
        != paired_test(truth, first, second, speakers, seed=1)
    )


def test_random_swaps_never_give_a_p_of_zero():
    truth, first, _, speakers = two_systems(EXACT_SPEAKERS + 14, 1)
    found = paired_test(truth, truth, first, speakers)
    assert set(found.p.values()) == {found.least_p} == {1 / (DRAWS + 1)}


def test_seeds_are_averaged_and_not_counted_as_samples():
    truth, first, second, speakers = two_systems(7, 1, better=0.2)
    once = paired_test(truth, first, second, speakers)
    five_times = paired_test(truth, np.repeat(first, 5, axis=0), np.repeat(second, 5, axis=0), speakers)
    assert five_times.p == once.p and five_times.difference == pytest.approx(once.difference)
    assert paired_test(truth, np.repeat(first, 5, axis=0), second[0], speakers).p == once.p
    with pytest.raises(ValueError, match="2 seeds of one system and 3 of the other"):
        paired_test(truth, np.repeat(first, 2, axis=0), np.repeat(second, 3, axis=0), speakers)


def test_a_constant_system_can_be_compared():
    truth, first, _, speakers = two_systems(7, 1)
    flat = np.full_like(truth, 2.7)
    found = paired_test(truth, first, flat, speakers)
    assert list(found.difference.values()) == pytest.approx(all_figures(truth, first))
    assert set(paired_test(truth, flat, flat + 0.1, speakers).p.values()) <= {1.0, *np.arange(2, 129) / 128}


def test_over_corpora_differences_are_averaged_and_speakers_swapped_within_their_corpus():
    one, other = two_systems(4, 1, better=0.2), two_systems(3, 1, rows=20, better=0.1, seed=5)
    found = paired_test_over([Pair(*one), Pair(*other)])
    seen = np.zeros(5)
    reached, differences = np.zeros(5), {}
    for number, (truth, first, second, speakers) in enumerate((one, other)):
        names = np.array(speakers)
        for swap in product([False, True], repeat=len(set(speakers))):
            rows = np.isin(names, np.unique(names)[list(swap)])[:, None]
            swapped = np.where(rows, second[0], first[0]), np.where(rows, first[0], second[0])
            differences[number, swap] = np.subtract(*(all_figures(truth, guess) for guess in swapped))
        seen += differences[number, (False,) * len(set(speakers))] / 2
    for first_swap, second_swap in product(product([False, True], repeat=4), product([False, True], repeat=3)):
        both = (differences[0, first_swap] + differences[1, second_swap]) / 2
        reached += np.abs(both) >= np.abs(seen) - 1e-10
    assert list(found.difference.values()) == pytest.approx(seen)
    assert list(found.p.values()) == pytest.approx(reached / 128)
    assert (found.speakers, found.exact) == (7, True)


def test_the_interval_of_one_corpus_is_that_of_a_change_and_narrows_with_another_like_it():
    truth, first, second, speakers = two_systems(9, 2, better=0.2)
    found = paired_test(truth, first, second, speakers)
    change, bounds = ccc_change(truth, second, first, speakers)
    for name in FIGURES:
        assert found.difference[name] == pytest.approx(change[name])
        assert found.interval[name] == pytest.approx(bounds[name])
    twice = paired_test_over([Pair(truth, first, second, speakers)] * 2)
    assert twice.difference == pytest.approx(found.difference)
    for name in FIGURES:
        (low, high), (wide_low, wide_high) = twice.interval[name], found.interval[name]
        # The root of 2 by the second corpus, and a quantile of 16 degrees of freedom in place of 8.
        assert (high - low) / (wide_high - wide_low) == pytest.approx(2.1199 / 2.3060 / 2**0.5, abs=1e-4)
    few = two_systems(5, 1)
    assert paired_test_over([Pair(truth, first, second, speakers), Pair(*few)]).interval is None


def test_predictions_that_are_not_finite_are_refused_and_not_called_better():
    truth, first, second, speakers = two_systems(7, 1)
    first[0, 3, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        paired_test(truth, first, second, speakers)


def test_holm_is_the_step_down_of_the_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.3]) == [0.3]
    with pytest.raises(ValueError, match="not"):
        holm([0.2, 1.2])
    with pytest.raises(ValueError, match="not"):
        holm([float("nan")])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_definition_rejects(values, level):
    rejected: set[int] = set()
    for left, place in zip(range(len(values), 0, -1), sorted(range(len(values)), key=values.__getitem__), strict=True):
        if values[place] * left > level:
            break
        rejected.add(place)
    found = holm(values)
    assert {place for place, p in enumerate(found) if p <= level} == rejected
    assert all(low <= high <= 1 for low, high in zip(values, found, strict=True))


def test_primitives_of_all_tests_are_one_family_and_the_mean_is_its_own():
    tests = {
        name: paired_test(*two_systems(8, 1, better=better, seed=4))
        for name, better in (("a", 0.1), ("b", 0.3), ("c", 0.0))
    }
    found = corrected(tests)
    family = holm([tests[name].p[primitive] for name in tests for primitive in PRIMITIVES])
    assert [found[name][primitive] for name in tests for primitive in PRIMITIVES] == family
    assert [found[name]["mean"] for name in tests] == holm([test.p["mean"] for test in tests.values()])
    assert list(found["a"]) == list(FIGURES)
