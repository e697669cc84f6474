"""Ablations: the level of the input, features by speaker, a pretraining that hears test speakers; and their marks."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speech
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_voices import TINY, put_corpus, recipe

from cpcscale import config
from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import FoldResult, run_fold
from cpcscale.emotion.encoders import networks
from cpcscale.emotion.encoders.layer import LayerFeatures
from cpcscale.emotion.encoders.networks import encoder_digest, pretrain_on_corpus
from cpcscale.emotion.finetune_result import combine_folds
from cpcscale.emotion.inputs import fold_inputs, prepare
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.speaker_norm import ScaledFeatures, SpeakerScale, speaker_scales, vectors_scale
from cpcscale.errors import UserError
from cpcscale.handmade.statistics import summarise
from cpcscale.model.cpc import build


def fold(settings: EmotionRecipe, number: int = 1) -> FoldResult:
    return run_fold(settings, prepare(settings, open_corpus(settings.corpus)), number)


def spoilt(folder: Path, settings: EmotionRecipe, to: Path, *, test: bool = True) -> EmotionRecipe:
    """The recipe on a corpus in which the test speakers' audio (or the training speakers') is noise."""
    corpus = open_corpus(settings.corpus)
    split = fold_splits(settings, corpus).splits[1]
    shutil.copytree(folder, to)
    noise = np.random.default_rng(1)
    for row in split.test_rows if test else split.train_rows:
        soundfile.write(to / Path(corpus.utterances[row].path).name, noise.normal(0, 0.1, 9000), 16_000)
    return replace(settings, corpus=replace(settings.corpus, path=str(to)))


WAVE = 0.1 * torch.randn(2, 3200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.03
SAMPLES = torch.tensor([3200, 1600])


def heard(wave_norm: str, wave_BS: torch.Tensor = WAVE, gain: float = 7.0) -> torch.Tensor:
    network = build(TINY, seed=0, offset=0.01, gain=gain).double()
    with torch.inference_mode():
        return LayerFeatures(network, "both", wave_norm)(wave_BS, SAMPLES)[1, :10]


def test_the_corpus_level_is_the_networks_own():
    network = build(TINY, seed=0, offset=0.01, gain=7.0).double()
    with torch.inference_mode():
        torch.testing.assert_close(heard("corpus"), network.layer(WAVE, "both")[1, :10])


@given(gain=st.floats(0.2, 5), shift=st.floats(-0.2, 0.2))
def test_by_window_neither_loudness_nor_an_offset_is_heard_nor_what_pads_the_row(gain, shift):
    loud_BS = gain * WAVE + shift
    loud_BS[1, 1600:] = 5.0
    torch.testing.assert_close(heard("window", loud_BS), heard("window"), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(heard("corpus", 3 * WAVE), heard("corpus"), atol=1e-2)


def test_by_window_a_row_is_at_zero_mean_and_unit_variance_and_silence_stays_silent():
    network = build(TINY, seed=0).double()
    row_BS = WAVE[:1]
    scaled_BS = (row_BS - row_BS.mean()) / row_BS.std(correction=0)
    with torch.inference_mode():
        expected = network.layer(scaled_BS, "both")
        found = LayerFeatures(network, "both", "window")(row_BS, torch.tensor([3200]))
        silent = LayerFeatures(network, "both", "window")(torch.full_like(row_BS, 0.1), torch.tensor([3200]))
        torch.testing.assert_close(silent, network.layer(torch.zeros_like(row_BS), "both"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_a_norm_the_networks_level_plays_no_part():
    torch.testing.assert_close(heard("none"), heard("none", gain=1.0))
    torch.testing.assert_close(heard("window"), heard("window", gain=1.0))
    assert not torch.allclose(heard("corpus"), heard("corpus", gain=1.0), atol=1e-2)


@pytest.mark.parametrize("system", ["random", "raw", "precpc"])
def test_the_norm_reaches_every_system_with_an_encoder(folder, checkpoint, system, caplog):
    guesses = []
    for wave_norm in ("corpus", "window", "none"):
        settings = recipe(folder, system, checkpoint, epochs=1)
        settings.encoder.wave_norm = wave_norm
        guesses.append(fold(settings).guess_UP)
    assert not any(np.allclose(one, other) for one, other in itertools.pairwise(guesses))
    warned = [record.message for record in caplog.records if "wave_norm" in record.message]
    assert len(warned) == (2 if system == "precpc" else 0)


def test_an_unknown_norm_is_refused():
    with pytest.raises(UserError, match="peak"):
        config.build(EmotionRecipe, {"encoder": {"wave_norm": "peak"}})


def test_each_speaker_is_scaled_by_its_own_and_others_by_the_training_part():
    x_UF = np.random.default_rng(0).normal(3, 2, (9, 4))
    speakers = ["a", "b", "", "a", "b", "alone", "a", "", "b"]
    train = [0, 1, 2]
    scales = speaker_scales(speakers, lambda rows: vectors_scale(x_UF[list(rows)]), lambda: vectors_scale(x_UF[train]))
    for name in ("a", "b"):
        rows = [row for row, speaker in enumerate(speakers) if speaker == name]
        scaled = np.stack([scales[row](x_UF[row]) for row in rows])
        np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-5)
    expected = vectors_scale(x_UF[train])
    for row in (2, 5, 7):
        np.testing.assert_array_equal(scales[row].mean_C, expected.mean_C)


def test_a_feature_that_never_varies_is_only_shifted_and_slices_keep_their_scales():
    scale = SpeakerScale(np.float32([1, 2]), np.float32([0, 4]))
    np.testing.assert_array_equal(scale(np.float32([[3, 10]])), [[2, 2]])
    known = [(np.full((1, 2), float(row)),) for row in range(4)]
    scales = [SpeakerScale(np.float32([row, row]), np.float32([1, 1])) for row in range(4)]
    assert all((window == 0).all() for parts in ScaledFeatures(known, scales)[1:3] for window in parts)
    assert len(ScaledFeatures(known, scales)[1:3]) == 2


@pytest.mark.parametrize("system", ["functionals", "prosody", "mfcc", "logmel", "random", "precpc"])
@pytest.mark.parametrize("head", ["auto", "svr"])
def test_features_are_scaled_by_speaker_for_every_system_that_has_some(folder, checkpoint, system, head):
    settings = replace(recipe(folder, system, checkpoint), speaker_norm=True, head=head, svm_search=False)
    corpus = open_corpus(settings.corpus)
    prepared = prepare(settings, corpus)
    split = fold_splits(settings, corpus).splits[1]
    source = fold_inputs(settings, prepared, split)
    rows = [row for row, speaker in enumerate(corpus.speakers) if speaker == split.test[0]]
    if prepared.vectors_UF is not None:
        scaled = source.vectors(rows)
    else:
        parts = source.inputs(rows)
        scaled = np.concatenate([x_TC for windows in parts for x_TC in windows])
        np.testing.assert_allclose(source.vectors(rows[:1])[0], summarise(parts[0][0]), rtol=1e-5)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-3)
    spread = scaled.std(axis=0)
    assert (np.isclose(spread, 1, atol=1e-2) | (spread < 1e-2)).all()
    result = combine_folds(settings, prepared, [run_fold(settings, prepared, number) for number in range(3)])
    assert result.marks == ["SPEAKER-ADAPTED"]


def test_of_each_utterance_only_its_own_speaker_is_heard(folder, tmp_path):
    settings = replace(recipe(folder, "functionals"), speaker_norm=True, svm_search=False)
    other = spoilt(folder, settings, tmp_path / "tones", test=False)

    def vectors(which: EmotionRecipe, part: str) -> np.ndarray:
        corpus = open_corpus(which.corpus)
        split = fold_splits(which, corpus).splits[1]
        return fold_inputs(which, prepare(which, corpus), split).vectors(getattr(split, part))

    np.testing.assert_allclose(vectors(other, "test_rows"), vectors(settings, "test_rows"))
    assert not np.allclose(vectors(other, "train_rows"), vectors(settings, "train_rows"))


def test_speakers_are_scaled_for_features_that_stay_alone():
    for keys in ({"system": "raw"}, {"system": "precpc", "encoder": {"frozen": False}}):
        with pytest.raises(UserError, match="speaker_norm=true scales fixed features"):
            config.build(EmotionRecipe, {"speaker_norm": True, **keys})


def test_a_constant_hears_no_speaker_so_it_has_no_mark(folder):
    settings = replace(recipe(folder, "mean"), speaker_norm=True, pretraining_on="corpus")
    assert settings.marks == []


@pytest.fixture
def pretrained(monkeypatch) -> list[list[str]]:
    """minicpc's pretraining replaced by a network that follows from the files; the speakers of each call."""
    from cpcscale.emotion.encoders import networks

    calls: list[list[str]] = []

    def pretrain_on(sources, recipe, folder):
        calls.append(sorted({source.group for source in sources}))
        heard = sum(len(Path(source.path).read_bytes()) for source in sources)
        return build(recipe.model, seed=heard)

    monkeypatch.setattr(networks, "pretrain_on", pretrain_on)
    return calls


def transductive(folder: Path, cache: Path, *, frozen: bool = True) -> EmotionRecipe:
    settings = replace(
        recipe(folder, "minicpc"), pretraining_on="corpus", audio_cache=AudioCacheConfig(path=str(cache))
    )
    settings.encoder.frozen = frozen
    return settings


@pytest.mark.parametrize("frozen", [True, False])
def test_on_the_corpus_minicpc_is_pretrained_once_for_all_folds_and_runs_and_is_marked(
    folder, tmp_path, pretrained, frozen
):
    settings = transductive(folder, tmp_path / "cache", frozen=frozen)
    corpus = open_corpus(settings.corpus)
    prepared = prepare(settings, corpus)
    results = [run_fold(settings, prepared, number) for number in range(3)]
    assert combine_folds(settings, prepared, results).marks == ["TRANSDUCTIVE"]
    assert pretrained == [[f"voice{number}" for number in range(6)]]
    again = run_fold(settings, prepare(settings, corpus), 1)
    np.testing.assert_array_equal(again.guess_UP, results[1].guess_UP)
    prepare(replace(settings, seed=1), corpus)
    assert len(pretrained) == 1
    longer = replace(settings.pretraining, train=replace(settings.pretraining.train, steps=7))
    prepare(replace(settings, pretraining=longer), corpus)
    assert len(pretrained) == 2


def test_test_speakers_reach_the_network_with_the_flag_and_not_without(folder, tmp_path, pretrained):
    settings = transductive(folder, tmp_path / "cache")
    other = spoilt(folder, settings, tmp_path / "tones")
    with_flag = [fold(which) for which in (settings, other)]
    without = [fold(replace(which, pretraining_on="fold")) for which in (settings, other)]
    assert with_flag[0].curve != with_flag[1].curve
    assert without[0].curve == without[1].curve
    assert [len(speakers) for speakers in pretrained] == [6, 6, 4, 4]


def test_the_network_in_the_cache_is_that_of_a_real_pretraining_on_all_files(tmp_path):
    folder = put_corpus(tmp_path / "tones", each=2)
    settings = transductive(folder, tmp_path / "cache")
    settings = replace(settings, pretraining=speech.recipe(train__steps=2, train__batch=4, train__lanes=2))
    waves = Waves.open(open_corpus(settings.corpus), settings.audio_cache)
    made = pretrain_on_corpus(settings, waves, None)
    direct = networks.pretrain_on_rows(settings, waves.corpus, None, range(len(waves)))
    assert encoder_digest(pretrain_on_corpus(settings, waves, None)) == encoder_digest(made)
    assert encoder_digest(direct) == encoder_digest(made)


def test_a_pretraining_that_fails_leaves_nothing_that_the_next_run_would_take(folder, tmp_path, monkeypatch):
    settings = transductive(folder, tmp_path / "cache")
    waves = Waves.open(open_corpus(settings.corpus), settings.audio_cache)

    def fails(*_: object) -> None:
        raise UserError("the loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(networks, "pretrain_on_rows", fails)
        with pytest.raises(UserError, match="not finite"):
            pretrain_on_corpus(settings, waves, None)
    monkeypatch.setattr(networks, "pretrain_on_rows", lambda *_: build(TINY, seed=4))
    assert encoder_digest(pretrain_on_corpus(settings, waves, None)) == encoder_digest(build(TINY, seed=4))


def test_both_marks_stand_together(folder):
    settings = replace(recipe(folder, "minicpc"), pretraining_on="corpus", speaker_norm=True)
    assert settings.marks == ["TRANSDUCTIVE", "SPEAKER-ADAPTED"]
