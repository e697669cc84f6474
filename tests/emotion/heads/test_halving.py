from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_voices import put_checkpoint, recipe

from cpcscale.emotion.batching import seeded
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig
from cpcscale.emotion.heads.halving import best_fit, candidates, rungs, searched_settings, successive_halving
from cpcscale.emotion.heads.training import FitConfig, HeadTraining, TrainingExamples
from cpcscale.emotion.inputs import prepare
from cpcscale.errors import UserError
from cpcscale.experiments.sweep.config import SweepConfig


def fits(rates: list[float], epochs: int) -> list[HeadTraining]:
    """One recogniser at several learning rates, on labels that are levels of its features."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (36, 3))
    inputs = [np.tile(row, (4, 1)).astype(np.float32) + rng.normal(0, 0.1, (4, 3)).astype(np.float32) for row in truth]
    train, dev = TrainingExamples(inputs[:24], truth[:24]), TrainingExamples(inputs[24:], truth[24:])
    made = []
    for rate in rates:
        with seeded(0, "weights"):
            network = AttentionHead(AttentionHeadConfig(heads=1, hidden=8, dense=8), 3)
        made.append(HeadTraining(network, train, dev, FitConfig(epochs=epochs, batch=12, learning_rate=rate), seed=0))
    return made


def test_a_quarter_goes_on_at_each_rung_and_one_to_the_end():
    made = fits([0.0] * 14 + [3e-3, 1e-2], epochs=20)
    trained = [place for place, _ in successive_halving(made, 20)]
    lengths = [len(fit.curve) for fit in made]
    assert rungs(20) == [2, 7]
    assert sorted(lengths) == [2] * 12 + [7] * 3 + [20]
    assert len(trained) == sum(lengths) == 65
    assert best_fit(made) in (14, 15) and lengths[best_fit(made)] == 20


def test_the_choice_is_the_best_development_score_of_any_epoch():
    made = fits([1e-3, 1e-2, 3e-3, 0.0], epochs=9)
    list(successive_halving(made, 9))
    found = [max(epoch.dev_ccc for epoch in fit.curve) for fit in made]
    assert found[best_fit(made)] == max(found)


def test_a_fit_that_took_turns_is_the_one_that_trained_alone():
    (alone,) = fits([1e-2], epochs=9)
    list(alone)
    made = fits([0.0, 1e-2, 0.0, 0.0], epochs=9)
    list(successive_halving(made, 9))
    assert made[1].curve == alone.curve
    for mine, other in zip(made[1].finish().parameters(), alone.finish().parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@given(epochs=st.integers(1, 200))
def test_rungs_rise_and_come_before_the_last_epoch(epochs):
    found = rungs(epochs)
    assert found == sorted(set(found)) and all(0 < rung < epochs for rung in found)


def test_all_systems_have_the_same_candidates_and_trained_encoders_fewer(folder):
    searched = [candidates(replace(recipe(folder, system), fit_search=True)) for system in ("mfcc", "logmel", "random")]
    assert [[searched_settings(each) for each in one] for one in searched[1:]] == [
        [searched_settings(each) for each in searched[0]]
    ] * 2
    assert len(searched[0]) == len({tuple(searched_settings(each).items()) for each in searched[0]}) == 16
    assert len(candidates(replace(recipe(folder, "raw"), fit_search=True))) == 4
    assert candidates(recipe(folder, "mfcc")) == [recipe(folder, "mfcc")]


@pytest.mark.parametrize("system", ["mfcc", "raw"])
def test_the_result_says_what_was_chosen_and_is_that_config_alone(folder, tmp_path, system):
    searched = replace(recipe(folder, system, put_checkpoint(tmp_path), epochs=4), fit_search=True)
    prepared = prepare(searched, open_corpus(searched.corpus))
    result = run_fold(searched, prepared, 0)
    (one,) = [each for each in candidates(searched) if searched_settings(each).items() <= result.chosen.items()]
    alone = run_fold(replace(one, fit_search=False), prepared, 0)
    np.testing.assert_array_equal(alone.guess_UP[: len(result.guess_UP)], result.guess_UP)
    assert alone.chosen == {name: result.chosen[name] for name in ("epoch", "dev_ccc")}


def test_a_search_is_refused_where_there_is_nothing_to_choose(folder):
    for changes in ({"system": "functionals"}, {"head": "svr"}, {"system": "mean"}):
        with pytest.raises(UserError, match="fit_search"):
            replace(recipe(folder, "mfcc"), fit_search=True, **changes)
    with pytest.raises(UserError, match="fit_search"):
        SweepConfig(fit_search=True)
