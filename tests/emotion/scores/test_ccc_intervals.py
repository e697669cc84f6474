import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchmetrics.functional import concordance_corrcoef, mean_squared_error, pearson_corrcoef
from torchmetrics.functional.classification import multiclass_recall

from cpcscale.emotion.scores.ccc import ccc
from cpcscale.emotion.scores.ccc_intervals import (
    FIGURES,
    agreement,
    bootstrap_interval,
    by_group,
    ccc_gap,
    ccc_of,
    interval,
    mean_of_folds,
    scores,
    seed_deviation,
    speaker_sums,
    unweighted_average_recall,
    weighted_sums,
)


def voices(count: int, rows: int = 20, seed: int = 0, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Predictions with an error of their own for each voice, so that speakers are what varies."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1, (count * rows, 3))
    offset = np.repeat(rng.normal(0, spread, (count, 3)), rows, axis=0)
    guess = 0.7 * truth + offset + rng.normal(0, 0.4, truth.shape)
    return truth, guess, [f"v{number}" for number in range(count) for _ in range(rows)]


def test_scores_name_each_primitive_and_their_mean():
    truth, guess, _ = voices(4)
    each = ccc(truth, guess)
    assert scores(truth, guess) == pytest.approx(
        {"activation": each[0], "valence": each[1], "dominance": each[2], "mean": each.mean()}
    )


def test_the_mean_of_folds_is_not_the_pooled_figure():
    truth, guess, _ = voices(2, spread=1.0)
    folds = [scores(truth[:20], guess[:20]), scores(truth[20:], guess[20:])]
    assert mean_of_folds(folds)["valence"] == pytest.approx((folds[0]["valence"] + folds[1]["valence"]) / 2)
    assert abs(mean_of_folds(folds)["mean"] - scores(truth, guess)["mean"]) > 0.01


def test_the_interval_is_the_jackknife_written_out():
    truth, guess, speakers = voices(8)
    names = np.array(speakers)
    z = np.array([np.arctanh(ccc(truth[names != v, 0], guess[names != v, 0])) for v in sorted(set(speakers))])
    error = np.sqrt(7 / 8 * ((z - z.mean()) ** 2).sum())
    reach = stats.t.ppf(0.975, 7) * error
    middle = np.arctanh(ccc(truth[:, 0], guess[:, 0]))
    found = interval(truth, guess, speakers)
    assert found is not None
    assert found["activation"] == pytest.approx([np.tanh(middle - reach), np.tanh(middle + reach)])


def test_the_interval_holds_the_estimate_and_does_not_depend_on_the_order_of_rows():
    truth, guess, speakers = voices(8)
    found = interval(truth, guess, speakers)
    assert found is not None
    for name, value in scores(truth, guess).items():
        assert found[name][0] < value < found[name][1]
    order = np.random.default_rng(1).permutation(len(truth))
    mixed = interval(truth[order], guess[order], [speakers[row] for row in order])
    assert mixed is not None and all(mixed[name] == pytest.approx(found[name]) for name in found)


def test_the_jackknife_covers_the_truth_as_often_as_it_says_and_the_percentile_bootstrap_less():
    trials, inside, inside_bootstrap, wider = 300, 0, 0, 0
    truth, guess, _ = voices(3000, rows=10, seed=1)
    target = scores(truth, guess)["activation"]
    for seed in range(trials):
        made = voices(10, rows=10, seed=seed + 2)
        found, drawn = interval(*made), bootstrap_interval(*made, seed=seed, replicates=400)
        assert found is not None and drawn is not None
        inside += found["activation"][0] <= target <= found["activation"][1]
        inside_bootstrap += drawn["activation"][0] <= target <= drawn["activation"][1]
        wider += np.ptp(found["activation"]) > np.ptp(drawn["activation"])
    assert 0.91 <= inside / trials <= 0.98  # three deviations of a share of .95 over 300 are .038
    assert 0.82 <= inside_bootstrap / trials < inside / trials - 0.02
    assert wider > 0.9 * trials


def test_the_bootstrap_draws_whole_speakers_and_is_keyed_by_its_seed():
    truth, guess, speakers = voices(8)
    rows = {voice: np.flatnonzero(np.array(speakers) == voice) for voice in sorted(set(speakers))}
    drawn = np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), size=200)
    figures = []
    for counts in drawn:
        chosen = np.concatenate([np.tile(rows[voice], count) for voice, count in zip(rows, counts, strict=True)])
        figures.append(list(scores(truth[chosen], guess[chosen]).values()))
    expected = np.quantile(figures, [0.025, 0.975], axis=0).T
    found = bootstrap_interval(truth, guess, speakers, seed=5, replicates=200)
    assert found is not None and [found[name] for name in FIGURES] == [pytest.approx(pair) for pair in expected]
    order = np.random.default_rng(1).permutation(len(truth))
    mixed = bootstrap_interval(truth[order], guess[order], [speakers[row] for row in order], seed=5, replicates=200)
    assert mixed is not None and all(mixed[name] == pytest.approx(found[name]) for name in found)
    assert found != bootstrap_interval(truth, guess, speakers, seed=6, replicates=200)


def test_under_six_speakers_there_is_no_interval():
    assert interval(*voices(5)) is None and bootstrap_interval(*voices(5), seed=0) is None
    assert interval(*voices(6)) is not None and bootstrap_interval(*voices(6), seed=0) is not None


def test_degenerate_predictions_have_defined_intervals():
    truth, _, speakers = voices(7)
    flat = interval(truth, np.full_like(truth, 2.7), speakers)
    perfect = interval(truth, truth, speakers)
    assert flat is not None and set(map(tuple, flat.values())) == {(0.0, 0.0)}
    drawn = bootstrap_interval(truth, np.full_like(truth, 2.7), speakers, seed=0)
    assert drawn is not None and set(map(tuple, drawn.values())) == {(0.0, 0.0)}
    assert perfect is not None and perfect["mean"] == pytest.approx([1, 1], abs=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 3), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_sums_of_speakers_give_the_ccc_of_any_of_them_together(seed, count, seeds, offset, scale):
    rng = np.random.default_rng(seed)
    speakers = rng.integers(0, count, 30).astype(str)
    truth = offset + scale * rng.normal(0, 1, (30, 3))
    guess = truth + scale * rng.normal(rng.normal(0, 1), 1, (seeds, 30, 3))
    sums = speaker_sums(truth, guess, speakers)
    names = np.unique(speakers)
    chosen = rng.integers(0, 2, len(names)).astype(bool)
    chosen[rng.integers(len(names))] = True
    rows = np.isin(speakers, names[chosen])
    found = ccc_of(weighted_sums(chosen[None].astype(float), sums))[0]
    np.testing.assert_allclose(found, [ccc(truth[rows], one[rows]) for one in guess], atol=1e-7)


def test_several_seeds_are_averaged_inside_each_replicate_and_their_deviation_stands_apart():
    truth, guess, speakers = voices(8)
    rng = np.random.default_rng(3)
    guess_SUP = np.stack([guess + rng.normal(0, 0.3, guess.shape) for _ in range(5)])
    each = np.array([list(scores(truth, one).values()) for one in guess_SUP])
    assert list(scores(truth, guess_SUP).values()) == pytest.approx(each.mean(axis=0))
    deviation = seed_deviation(truth, guess_SUP)
    assert deviation is not None and list(deviation.values()) == pytest.approx(each.std(axis=0, ddof=1))
    assert seed_deviation(truth, guess) is None and seed_deviation(truth, guess_SUP[:1]) is None
    names = np.array(speakers)
    without = [
        np.mean([ccc(truth[names != voice, 1], one[names != voice, 1]) for one in guess_SUP])
        for voice in sorted(set(speakers))
    ]
    error = np.sqrt(7 / 8 * ((np.arctanh(without) - np.arctanh(without).mean()) ** 2).sum())
    middle, reach = np.arctanh(each.mean(axis=0)[1]), stats.t.ppf(0.975, 7) * error
    found = interval(truth, guess_SUP, speakers)
    assert found is not None and found["valence"] == pytest.approx([np.tanh(middle - reach), np.tanh(middle + reach)])


def test_the_same_seed_five_times_gives_the_interval_of_one():
    truth, guess, speakers = voices(8)
    five = np.repeat(guess[None], 5, axis=0)
    for once, often in (
        (interval(truth, guess, speakers), interval(truth, five, speakers)),
        (bootstrap_interval(truth, guess, speakers, seed=0), bootstrap_interval(truth, five, speakers, seed=0)),
    ):
        assert once is not None and often is not None
        assert all(often[name] == pytest.approx(once[name]) for name in FIGURES)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.1, 5))
def test_ccc_is_pearson_times_the_bias_correction_and_the_parts_are_torchmetrics_own(seed, bias, ratio):
    rng = np.random.default_rng(seed)
    truth = rng.normal(3, 1, (40, 3))
    guess = bias + ratio * (truth - 3) + rng.normal(3, ratio, (40, 3))
    found = agreement(truth, guess)
    # torchmetrics takes unbiased variances; over n copies of the rows the two definitions meet as 1 / n.
    many = [torch.from_numpy(np.tile(array, (500, 1))) for array in (guess, truth)]
    judged = (
        (found["pearson"], pearson_corrcoef(*many), 1e-6),
        (found["rmse"], mean_squared_error(*many, squared=False, num_outputs=3), 1e-6),
        (scores(truth, guess), concordance_corrcoef(*many), 5e-5),
    )
    for ours, theirs, reach in judged:
        assert list(ours.values())[:3] == pytest.approx(theirs.tolist(), abs=reach)
    for name in FIGURES[:3]:
        assert found["pearson"][name] * found["bias_correction"][name] == pytest.approx(scores(truth, guess)[name])


def test_scale_bias_and_calibration_are_told_in_units_of_the_labels():
    truth = np.random.default_rng(0).normal(3, 1, (50, 3))
    found = agreement(truth, 2 * truth - 2.5)
    assert found["scale_ratio"] == pytest.approx(dict.fromkeys(FIGURES, 2))
    assert found["slope"] == pytest.approx(dict.fromkeys(FIGURES, 0.5))  # spreads too far by a factor of two
    assert found["pearson"] == pytest.approx(dict.fromkeys(FIGURES, 1))
    shift = truth.mean(axis=0) - 2.5
    assert [found["bias"][name] for name in FIGURES] == pytest.approx([*shift, shift.mean()])
    noisy = agreement(truth, truth + np.random.default_rng(1).normal(0, 1, truth.shape))
    line = stats.linregress((truth + np.random.default_rng(1).normal(0, 1, truth.shape))[:, 2], truth[:, 2])
    assert noisy["slope"]["dominance"] == pytest.approx(line.slope)
    both = agreement(truth, np.stack([truth + 1, truth + 3]))
    assert both["bias"] == pytest.approx(dict.fromkeys(FIGURES, 2))


def test_a_constant_column_leaves_the_parts_finite():
    truth = np.random.default_rng(0).normal(3, 1, (50, 3))
    flat = np.full_like(truth, 2.7)
    for made in (agreement(truth, flat), agreement(flat, truth), agreement(flat, flat)):
        assert all(np.isfinite(value) for figures in made.values() for value in figures.values())
        assert set(made["pearson"].values()) == set(made["bias_correction"].values()) == {0.0}
    assert agreement(flat, flat)["rmse"]["mean"] == 0


def test_each_fold_is_scored_by_itself_and_rows_of_no_group_are_left_out():
    truth, guess, _ = voices(4)
    folds = [row % 3 for row in range(80)]
    found = by_group(truth, guess, folds)
    assert list(found) == [0, 1, 2] and found[1] == scores(truth[1::3], guess[1::3])
    gender = ["", "male", "female", "male"] * 20
    assert list(by_group(truth, guess, gender)) == ["female", "male"]
    assert by_group(truth, guess, gender)["female"] == scores(truth[2::4], guess[2::4])


def test_the_gap_between_groups_is_the_jackknife_written_out():
    truth, guess, speakers = voices(9)
    names = np.array(speakers)
    gender = np.array(["female", "male", "female", "", "male", "male", "female", "female", "male"]).repeat(20)
    found = ccc_gap(truth, guess, speakers, list(gender), first="female", second="male")

    def difference(keep: np.ndarray) -> np.ndarray:
        female, male = (
            scores(truth[keep & (gender == sex)], guess[keep & (gender == sex)]) for sex in ("female", "male")
        )
        return np.array([female[name] - male[name] for name in FIGURES])

    without = np.array([difference(names != voice) for voice in np.unique(names[gender != ""])])
    reach = stats.t.ppf(0.975, 7) * np.sqrt(7 / 8 * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    middle = difference(np.ones(180, bool))
    assert list(found.difference.values()) == pytest.approx(middle) and found.speakers == (4, 4)
    assert found.interval is not None
    assert [found.interval[name] for name in FIGURES] == [
        pytest.approx([value - one, value + one]) for value, one in zip(middle, reach, strict=True)
    ]


def test_a_speaker_in_both_groups_is_left_out_of_both_at_once():
    truth, guess, speakers = voices(7)
    style = ["improvised", "scripted"] * 70
    found = ccc_gap(truth, guess, speakers, style, first="improvised", second="scripted")
    assert found.speakers == (7, 7) and found.interval is not None
    # Only what a speaker says is said twice: no speaker makes a difference between the two.
    twice = ccc_gap(
        truth.repeat(2, axis=0),
        guess.repeat(2, axis=0),
        np.repeat(speakers, 2).tolist(),
        style * 2,
        first="improvised",
        second="scripted",
    )
    assert twice.interval is not None
    assert [twice.interval[name] for name in FIGURES] == [pytest.approx([0, 0], abs=1e-9)] * 4


def test_too_few_speakers_for_a_gap_give_none_and_a_group_of_nobody_is_an_error():
    truth, guess, speakers = voices(6)
    gender = ["female"] * 20 + ["male"] * 100
    assert ccc_gap(truth, guess, speakers, gender, first="female", second="male").interval is None
    gender = ["female"] * 40 + ["male"] * 80
    assert ccc_gap(truth, guess, speakers, gender, first="female", second="male").interval is not None
    assert (
        ccc_gap(truth[:100], guess[:100], speakers[:100], gender[:100], first="female", second="male").interval is None
    )
    with pytest.raises(ValueError, match="no row is of group 'other'"):
        ccc_gap(truth, guess, speakers, gender, first="female", second="other")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=5, max_size=50))
def test_unweighted_average_recall_is_torchmetrics_macro_recall(pairs):
    pairs += [(name, 0) for name in range(5)]
    truth, guess = zip(*pairs, strict=True)
    theirs = multiclass_recall(torch.tensor(guess), torch.tensor(truth), num_classes=5, average="macro")
    assert unweighted_average_recall(truth, guess) == pytest.approx(float(theirs), abs=1e-6)


def test_recall_counts_the_classes_of_the_truth_alone_and_each_once():
    assert unweighted_average_recall(["a"] * 9 + ["b"], ["a"] * 10) == 0.5
    assert unweighted_average_recall(["a", "b"], ["c", "b"]) == 0.5
    with pytest.raises(ValueError, match="not 1, 2"):
        unweighted_average_recall(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one row"):
        unweighted_average_recall([], [])


def test_predictions_that_do_not_fit_are_refused():
    truth, guess, speakers = voices(6)
    for wrong in (guess[:-1], guess[:, :2], np.zeros((0, *guess.shape)), guess[:, 0]):
        with pytest.raises(ValueError, match="do not fit labels"):
            scores(truth, wrong)
        with pytest.raises(ValueError, match="do not fit labels"):
            interval(truth, wrong, speakers)
