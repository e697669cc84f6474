import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_corpora import speaker_splits

from cpcscale.emotion.heads import ridge
from cpcscale.emotion.heads.svm import GRID, Classifier, SVMConfig, choose_classifier_config, chosen_classifier
from cpcscale.emotion.heads.vectors import Regressor, choose_regressor_config
from cpcscale.emotion.protocol.splits import inner_splits
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.ccc_intervals import scores, unweighted_average_recall
from cpcscale.errors import UserError
from cpcscale.handmade.statistics import summarise

SPEAKERS = [f"s{row % 6}" for row in range(120)]
CLASSES = ("anger", "neutral", "sadness")


def made(rows: int = 120, features: int = 5, noise: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features, and labels on [-1, 1] that are smooth functions of them."""
    draw = np.random.default_rng(seed)
    x_UF = draw.standard_normal((rows, features))
    clean_UP = np.stack([np.tanh(x_UF[:, 0]), np.tanh(x_UF[:, 1] - x_UF[:, 2]), np.sin(x_UF[:, 3])], axis=1)
    return x_UF, np.clip(clean_UP + noise * draw.standard_normal(clean_UP.shape), -1, 1)


def made_classes(rows: int = 120, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    draw = np.random.default_rng(seed)
    which = draw.integers(0, 3, rows)
    return draw.standard_normal((rows, 4)) + 3 * np.eye(4)[which], [CLASSES[one] for one in which]


def test_each_primitive_is_learnt_from_the_same_features():
    x_UF, truth_UP = made(300)
    guess_UP = Regressor(SVMConfig(C=10)).fit(x_UF[:200], truth_UP[:200]).predict(x_UF[200:])
    assert guess_UP.shape == (100, 3) and guess_UP.dtype == np.float64
    found = scores(truth_UP[200:], guess_UP)
    assert all(found[name] > 0.8 for name in PRIMITIVES), found


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5), st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=5))
def test_the_units_of_a_feature_do_not_matter(scale, shift):
    x_UF, truth_UP = made(60)
    moved_UF = x_UF * np.array(scale) + np.array(shift)
    plain = Regressor(SVMConfig()).fit(x_UF[:40], truth_UP[:40]).predict(x_UF[40:])
    moved = Regressor(SVMConfig()).fit(moved_UF[:40], truth_UP[:40]).predict(moved_UF[40:])
    np.testing.assert_allclose(moved, plain, atol=5e-3)


def test_standardisation_is_of_the_fitted_rows_so_a_guess_does_not_depend_on_its_company():
    x_UF, truth_UP = made()
    known = Regressor(SVMConfig()).fit(x_UF[:80], truth_UP[:80])
    alone = np.concatenate([known.predict(x_UF[[row]]) for row in range(80, 120)])
    np.testing.assert_allclose(known.predict(x_UF[80:]), alone, rtol=1e-12)


def test_a_wild_value_counts_as_three_deviations():
    x_UF, truth_UP = made()
    known = Regressor(SVMConfig()).fit(x_UF, truth_UP)
    for value in (1e2, 1e9):
        wild, reach = x_UF[[0]].copy(), x_UF[[0]].copy()
        wild[0, 4], reach[0, 4] = value, x_UF[:, 4].mean() + 3 * x_UF[:, 4].std()
        np.testing.assert_allclose(known.predict(wild), known.predict(reach), rtol=1e-9)


def test_a_feature_that_never_varies_changes_no_guess_of_a_linear_machine():
    x_UF, truth_UP = made()
    wider_UF = np.column_stack([x_UF, np.full(len(x_UF), 7.0)])
    guesses = [Regressor(SVMConfig(kernel="linear")).fit(x, truth_UP).predict(x) for x in (x_UF, wider_UF)]
    np.testing.assert_allclose(*guesses, atol=1e-9)


def test_twice_the_same_features_give_the_same_guesses_as_once():
    # gamma counts in units of one over the number of features.
    x_UF, truth_UP = made()
    guesses = [Regressor(SVMConfig()).fit(x, truth_UP).predict(x) for x in (x_UF, np.hstack([x_UF, x_UF]))]
    np.testing.assert_allclose(*guesses, atol=1e-6)


def test_the_same_rows_give_the_same_bits():
    x_UF, truth_UP = made()
    first, second = (Regressor(SVMConfig()).fit(x_UF, truth_UP).predict(x_UF) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"C": 0.0}, "svm.C=0 fits nothing"),
        ({"gamma": 0.0}, "svm.gamma=0 fits nothing"),
        ({"epsilon": -0.1}, "svm.epsilon=-0.1"),
        ({"C": float("nan")}, "svm.C=nan"),
        ({"kernel": "radial"}, "svm.kernel='radial'"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(values, words):
    with pytest.raises(UserError, match=words):
        SVMConfig(**values)


def test_the_grid_is_16_trials_and_has_the_default():
    assert len({repr(one) for one in GRID}) == len(GRID) == 16 and SVMConfig() in GRID


def test_the_choice_is_the_config_that_does_best_on_held_out_speakers():
    x_UF, truth_UP = made(noise=0.02)
    useless, useful = SVMConfig(C=1e-6), SVMConfig(C=10)
    assert choose_regressor_config(x_UF, truth_UP, SPEAKERS, [useless, useful]) == useful
    assert choose_regressor_config(x_UF, truth_UP, SPEAKERS, [useful, useless]) == useful


def test_no_inner_fold_is_judged_on_a_voice_it_is_fitted_on():
    # One feature tells the speaker and the label is the speaker's own: known voices make it look like a fine feature.
    draw = np.random.default_rng(3)
    own = {speaker: draw.uniform(-1, 1, 3) for speaker in sorted(set(SPEAKERS))}
    truth_UP = np.stack([own[speaker] for speaker in SPEAKERS]) + 0.01 * draw.standard_normal((120, 3))
    who_U = np.array([int(speaker[1:]) for speaker in SPEAKERS], np.float64)
    x_UF = np.stack([who_U, who_U**2, who_U**3], axis=1)
    mixed = [f"s{row % 5}" for row in draw.permutation(120)]
    sharp, flat = SVMConfig(C=100, gamma=30), SVMConfig(C=1e-6)
    assert choose_regressor_config(x_UF, truth_UP, mixed, [flat, sharp]) == sharp
    judged = choose_regressor_config(x_UF, truth_UP, SPEAKERS, [flat, sharp], folds=6)
    assert judged == flat


@pytest.mark.parametrize("draw", range(8))
def test_the_inner_folds_are_those_of_every_other_system(draw):
    # Labels are noise, so which config is best hangs on how the folds fall.
    random = np.random.default_rng(draw)
    x_UF, truth_UP = random.standard_normal((120, 4)), random.uniform(-1, 1, (120, 3))
    speakers = [f"s{row % 12}" for row in range(120)]
    split = speaker_splits(speakers, 3, 0.25, seed=5)[1]
    rows = sorted(split.train_rows + split.dev_rows)
    grid = [SVMConfig(C=cost, gamma=gamma) for cost in (0.1, 1, 10) for gamma in (0.1, 1)]

    def by_splits(settings: SVMConfig) -> float:
        guess_UP = np.full((120, 3), np.nan)
        for part in inner_splits(split, speakers, 3, seed=5):
            known, held = list(part.train_rows), list(part.dev_rows)
            guess_UP[held] = Regressor(settings).fit(x_UF[known], truth_UP[known]).predict(x_UF[held])
        return scores(truth_UP[rows], guess_UP[rows])["mean"]

    voices = [speakers[row] for row in rows]
    assert choose_regressor_config(x_UF[rows], truth_UP[rows], voices, grid, 3, "5/inner/1") == max(grid, key=by_splits)


def test_rows_without_a_speaker_have_no_say_in_the_choice():
    x_UF, truth_UP = made()
    unknown = [*SPEAKERS, *[""] * 30]
    more_UF, more_UP = np.vstack([x_UF, x_UF[:30]]), np.vstack([truth_UP, -truth_UP[:30]])
    assert choose_regressor_config(more_UF, more_UP, unknown, GRID[::3]) == choose_regressor_config(
        x_UF, truth_UP, SPEAKERS, GRID[::3]
    )


def test_one_voice_is_too_few_to_choose_by_and_one_config_needs_no_choice():
    x_UF, truth_UP = made(20)
    with pytest.raises(UserError, match="20 training rows have 1 known speaker"):
        choose_regressor_config(x_UF, truth_UP, ["s0"] * 20, GRID)
    only = SVMConfig(C=3)
    assert choose_regressor_config(x_UF, truth_UP, ["s0"] * 20, [only]) == only
    assert choose_regressor_config(x_UF, truth_UP, ["s0"] * 10 + ["s1"] * 10, GRID[:2]) in GRID


def test_classes_are_guessed_for_new_speakers():
    x_UF, classes = made_classes()
    guesses = [""] * len(classes)
    for split in speaker_splits(SPEAKERS, 3, 0.25, seed=0):
        train, _, test = split.rows()
        known = [classes[row] for row in train]
        machine = chosen_classifier(x_UF[train], known, [SPEAKERS[row] for row in train], GRID[:4], folds=3)
        found = machine.predict(x_UF[test])
        for row, guess in zip(test, found, strict=True):
            guesses[row] = guess
    assert set(guesses) == set(CLASSES)
    assert unweighted_average_recall(classes, guesses) > 0.85


def test_rows_of_unknown_class_are_not_trained_on():
    x_UF, classes = made_classes()
    partly = ["" if row % 10 == 0 else one for row, one in enumerate(classes)]
    kept = [row for row, one in enumerate(partly) if one]
    voices = [SPEAKERS[row] for row in kept]
    guesses = chosen_classifier(x_UF, partly, SPEAKERS, GRID[:1]).predict(x_UF)
    without = chosen_classifier(x_UF[kept], [partly[row] for row in kept], voices, GRID[:1])
    assert list(guesses) == list(without.predict(x_UF))
    assert "" not in guesses


@pytest.mark.parametrize("grid", [GRID[:2], ridge.GRID], ids=["svr", "ridge"])
def test_the_arrays_of_a_regression_say_what_scikit_learn_says(grid):
    x_UF, truth_UP = made(noise=0.3)
    settings = choose_regressor_config(x_UF, truth_UP, SPEAKERS, grid)
    known = Regressor(settings).fit(x_UF[:100], truth_UP[:100])
    new_UF = np.concatenate([x_UF[100:], x_UF[100:] * 50])
    again = np.stack([machine.predict(new_UF) for machine in known.fitted], axis=1)
    np.testing.assert_allclose(again, known.predict(new_UF), atol=1e-6)


@given(st.integers(2, 5), st.sampled_from(["rbf", "linear"]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_arrays_of_a_classifier_say_what_scikit_learn_says(count, kernel, seed):
    draw = np.random.default_rng(seed)
    x_UF, classes = draw.standard_normal((60, 4)), [f"class {row % count}" for row in range(60)]
    x_UF[:, 0] += np.arange(60) % count
    machine = Classifier(SVMConfig(kernel=kernel)).fit(x_UF, classes)
    new_UF = draw.standard_normal((200, 4)) * 2
    found = [machine.classes[number] for number in machine.support_vectors.predict(new_UF)]
    assert found == list(machine.predict(new_UF))


def test_a_rare_class_weighs_as_much_as_a_common_one():
    draw = np.random.default_rng(1)
    classes = ["common"] * 180 + ["rare"] * 20
    x_UF = draw.standard_normal((200, 2)) + np.array([[0.0, 0.0]] * 180 + [[1.5, 0.0]] * 20)
    guesses = Classifier(SVMConfig(kernel="linear")).fit(x_UF, classes).predict(x_UF)
    # Without weights hardly any row is called rare.
    assert np.mean(guesses[180:] == "rare") > 0.6


def test_a_training_part_of_one_class_is_refused():
    with pytest.raises(UserError, match="3 training rows have 1 class"):
        Classifier(SVMConfig()).fit(np.eye(3), ["anger"] * 3)


def test_a_classifier_is_chosen_by_recall_and_epsilon_is_none_of_its_business():
    x_UF, classes = made_classes()
    useless = SVMConfig(C=1e-6, gamma=1e-6)
    useful = SVMConfig(C=1, epsilon=0.05)
    assert choose_classifier_config(x_UF, classes, SPEAKERS, [useless, useful, SVMConfig(C=1, epsilon=0.1)]) == useful


def test_a_summary_is_mean_deviation_and_percentiles_of_each_channel():
    x_TC = np.arange(11.0)[:, None] * np.array([1.0, -2.0])
    found = summarise(x_TC.astype(np.float32)).reshape(5, 2)
    np.testing.assert_allclose(found[0], [5, -10])
    np.testing.assert_allclose(found[1], np.sqrt(10) * np.array([1, 2]), rtol=1e-6)
    np.testing.assert_allclose(found[2:], [[1, -18], [5, -10], [9, -2]], rtol=1e-6)
    assert summarise(x_TC[:1]).dtype == np.float32


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000))
def test_a_summary_does_not_know_the_order_of_the_frames(frames, channels, seed):
    x_TC = np.random.default_rng(seed).standard_normal((frames, channels))
    np.testing.assert_allclose(summarise(x_TC), summarise(x_TC[::-1]), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (4,)])
def test_a_summary_of_no_frames_is_refused(shape):
    with pytest.raises(ValueError, match="at least one"):
        summarise(np.zeros(shape))
