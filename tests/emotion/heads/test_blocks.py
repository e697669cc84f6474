"""Blocks weigh the same whatever their width, and principal components are those of the training rows alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.emotion.heads import ridge, svm
from cpcscale.emotion.heads.blocks import COMPONENTS, REACH, UNSCALED, Block, BlockScale, scale_from
from cpcscale.emotion.heads.ridge import RidgeConfig
from cpcscale.emotion.heads.svm import SVMConfig
from cpcscale.emotion.heads.vectors import Regressor, choose_regressor_config, inner_folds, scales_of


def rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Vectors whose features vary together and by very different amounts."""
    random = np.random.default_rng(seed)
    return random.normal(3, 1, (count, width)) @ random.normal(0, 1, (width, width)) * np.logspace(-3, 3, width)


def squares(z_UG: np.ndarray) -> np.ndarray:
    return ((z_UG[:, None] - z_UG[None]) ** 2).sum(axis=2)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 100))
def test_a_block_made_twice_as_wide_by_repeating_itself_changes_no_distance(narrow, wide, seed):
    x_UF = rows(8, narrow + wide, seed)
    doubled_UF = np.concatenate([x_UF, x_UF[:, narrow:]], axis=1)
    one = BlockScale.of(x_UF, [Block(narrow), Block(wide)], 64)(x_UF)
    other = BlockScale.of(doubled_UF, [Block(narrow), Block(2 * wide)], 64)(doubled_UF)
    np.testing.assert_allclose(squares(one), squares(other), atol=1e-9)


def test_the_distance_is_the_mean_over_blocks_of_that_of_their_standardised_features():
    x_UF = rows(30, 7)
    z_UF = np.clip((x_UF - x_UF.mean(axis=0)) / x_UF.std(axis=0), -REACH, REACH)
    expected = (squares(z_UF[:, :2]) / 2 + squares(z_UF[:, 2:]) / 5) / 2
    np.testing.assert_allclose(squares(BlockScale.of(x_UF, [Block(2), Block(5)], 64)(x_UF)), expected, atol=1e-9)


def test_components_are_whitened_by_their_variance_and_a_hundredth_of_the_mean_one():
    x_UF = np.column_stack([rows(400, 12), np.arange(400.0)])
    scaled_UK = BlockScale.of(x_UF, [Block(13, 12)], 5)(x_UF) * np.sqrt(6)
    # Five components, and the feature that is not reduced.
    assert scaled_UK.shape == (400, 6)
    standard_UF = np.clip((x_UF - x_UF.mean(axis=0)) / x_UF.std(axis=0), -REACH, REACH)
    np.testing.assert_allclose(scaled_UK[:, 5], standard_UF[:, 12])
    variance_K, axes_FK = np.linalg.eigh(np.cov(standard_UF[:, :12].T, bias=True))
    whitened_UK = (standard_UF[:, :12] - standard_UF[:, :12].mean(axis=0)) @ axes_FK[:, ::-1][:, :5]
    whitened_UK /= np.sqrt(variance_K[::-1][:5] + 0.01 * variance_K.mean())
    np.testing.assert_allclose(np.abs(scaled_UK[:, :5]), np.abs(whitened_UK.clip(-REACH, REACH)), atol=1e-9)


def test_a_whole_block_has_its_features_beside_its_components_and_both_weigh_the_same():
    x_UF = rows(30, 13)
    plain, reduced, both = (
        BlockScale.of(x_UF, [block], 5) for block in (Block(13), Block(13, 12), Block(13, 12, whole=True))
    )
    expected = (squares(plain(x_UF)) + squares(reduced(x_UF))) / 2
    np.testing.assert_allclose(squares(both(x_UF)), expected, atol=1e-9)
    np.testing.assert_array_equal(scale_from(both.arrays())(x_UF), both(x_UF))


@pytest.mark.parametrize("count", [2, 9])
def test_there_are_fewer_components_than_training_rows(count):
    x_UF = rows(count, 40)
    scale = BlockScale.of(x_UF, [Block(40, 40)], 64)
    assert scale(x_UF).shape == (count, count - 1)
    # What no training row varies in counts for nothing, instead of being blown up.
    far = scale(x_UF.mean(axis=0) + 1e6 * rows(3, 40, 1))
    assert np.abs(far * np.sqrt(count - 1)).max() <= REACH


def test_constant_features_say_nothing():
    x_UF = np.column_stack([np.full(9, 0.1, np.float32), rows(9, 3)])
    for reduced in (0, 1):
        assert not BlockScale.of(x_UF, [Block(4, reduced)], 64)(x_UF)[:, 0].round(6).any()
    assert BlockScale.of(x_UF, [Block(4, 4)], 64)(x_UF).shape[1] < 4


def test_axes_that_the_training_rows_do_not_span_are_no_components():
    x_UF, other_UF = rows(12, 20), rows(12, 20, 1)
    # Each speaker's mean is taken away, as speaker_norm does: 12 rows of 4 speakers span 8 axes.
    x_UF = (x_UF.reshape(4, 3, 20) - x_UF.reshape(4, 3, 20).mean(axis=1, keepdims=True)).reshape(12, 20)
    scale = BlockScale.of(x_UF, [Block(20, 20)], 64)
    assert scale(other_UF).shape[1] <= 8
    assert (scale(x_UF).std(axis=0) > 0.5 / np.sqrt(8)).all()
    assert BlockScale.of(x_UF[:1], [Block(20, 20)], 64)(other_UF).shape == (12, 1)


def test_what_is_made_again_from_its_arrays_scales_alike():
    x_UF = rows(20, 9)
    scale = BlockScale.of(x_UF, [Block(6, 5), Block(3)], 4)
    arrays = scale.arrays()
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(scale_from(arrays)(x_UF), scale(x_UF))
    assert scale_from({}) == UNSCALED and UNSCALED(x_UF) is x_UF


def test_blocks_that_are_not_those_of_the_vectors_are_refused():
    with pytest.raises(ValueError, match="blocks of \\[2, 3\\] features do not fit vectors of 6"):
        BlockScale.of(rows(9, 6), [Block(2), Block(3)], 4)
    with pytest.raises(ValueError, match="not finite"):
        BlockScale.of(np.full((9, 2), np.nan), [Block(2)], 4)


def test_each_inner_fold_has_the_components_of_its_own_training_rows():
    x_UF = rows(24, 8)
    parts = inner_folds([str(row % 6) for row in range(24)], 3, "0")
    spoilt_UF = x_UF.copy()
    spoilt_UF[parts[0][1]] *= 1000
    one, other = (scales_of(each, parts, [Block(8, 8)])(4) for each in (x_UF, spoilt_UF))
    probe_UF = rows(5, 8, 1)
    np.testing.assert_array_equal(one[0](probe_UF), other[0](probe_UF))
    assert not np.allclose(one[1](probe_UF), other[1](probe_UF))


def test_the_number_of_components_is_searched_in_place_of_epsilon():
    assert len(svm.GRID) == len(svm.COMPONENTS_GRID) == 16
    assert {each.components for each in (*svm.COMPONENTS_GRID, *ridge.COMPONENTS_GRID)} == set(COMPONENTS)
    assert {each.epsilon for each in svm.COMPONENTS_GRID} == {0.1}


@pytest.mark.parametrize("of", [SVMConfig, RidgeConfig])
def test_the_number_of_components_that_predicts_best_is_chosen(of):
    random = np.random.default_rng(0)
    # The label is in the second of two strong directions; the others are noise.
    hidden_U2 = random.normal(0, 1, (120, 2))
    x_UF = hidden_U2 @ random.normal(0, 3, (2, 30)) + random.normal(0, 1, (120, 30))
    truth_UP = np.tile(hidden_U2[:, :1] / 3, 3)
    groups = [str(row % 6) for row in range(120)]
    grid = [of(components=1), of(components=2)]
    chosen = choose_regressor_config(x_UF, truth_UP, groups, grid, blocks=[Block(30, 30)])
    assert chosen.components == 2


def test_one_block_without_components_is_what_a_machine_makes_of_the_features_itself():
    x_UF = rows(60, 5)
    truth_UP = np.tile(np.tanh(x_UF[:, :1] / x_UF[:, :1].std()), 3)
    for settings in (SVMConfig(), SVMConfig(kernel="linear"), RidgeConfig(0.1)):
        plain = Regressor(settings).fit(x_UF, truth_UP).predict(x_UF)
        scaled = Regressor(settings, BlockScale.of(x_UF, [Block(5)], 64)).fit(x_UF, truth_UP)
        np.testing.assert_allclose(scaled.predict(x_UF), plain, atol=2e-3)
        made = np.stack([machine.predict(scaled.scale(x_UF)) for machine in scaled.fitted], axis=1)
        np.testing.assert_allclose(made, scaled.predict(x_UF), atol=1e-9)
