import numpy as np
import pytest
from scipy import stats

from cpcscale.emotion.score import interval, mean_of_folds, scores
from cpcscale.objective.ccc import ccc


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


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    trials, inside = 150, 0
    truth, guess, _ = voices(3000, rows=10, seed=1)
    target = scores(truth, guess)["activation"]
    for seed in range(trials):
        found = interval(*voices(10, rows=10, seed=seed + 2))
        assert found is not None
        inside += found["activation"][0] <= target <= found["activation"][1]
    assert 0.88 <= inside / trials <= 1


def test_under_six_speakers_there_is_no_interval():
    assert interval(*voices(5)) is None
    assert interval(*voices(6)) is not None


def test_degenerate_predictions_have_defined_intervals():
    truth, _, speakers = voices(7)
    flat = interval(truth, np.full_like(truth, 2.7), speakers)
    perfect = interval(truth, truth, speakers)
    assert flat is not None and set(map(tuple, flat.values())) == {(0.0, 0.0)}
    assert perfect is not None and perfect["mean"] == pytest.approx([1, 1], abs=1e-9)
