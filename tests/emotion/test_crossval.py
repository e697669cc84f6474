import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_voices import TINY, put_checkpoint, put_corpus, recipe

from cpcscale.emotion import features
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import FinetuneResult, combine, fold_splits, run_fold, start_fit
from cpcscale.emotion.features import Prepared, Source, encode, open_source, prepare, read_waves, statistics, wave_level
from cpcscale.emotion.recipe import SYSTEMS, EmotionRecipe
from cpcscale.emotion.score import scores
from cpcscale.errors import UserError
from cpcscale.model.cpc import build
from cpcscale.train.checkpoint import load_encoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return put_corpus(tmp_path_factory.mktemp("corpus") / "tones")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return put_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def pretrained_on(monkeypatch) -> list[list[str]]:
    """minicpc's pretraining replaced by a fresh network; the speakers of each call."""
    import cpcscale.emotion.minicpc as minicpc

    calls: list[list[str]] = []

    def pretrain_on(sources, recipe, folder):
        assert Path(folder).is_dir()
        calls.append(sorted({source.group for source in sources}))
        return build(recipe.model, seed=3)

    monkeypatch.setattr(minicpc, "pretrain_on", pretrain_on)
    return calls


def opened(settings: EmotionRecipe) -> tuple[Corpus, Prepared]:
    corpus = open_corpus(settings.corpus)
    return corpus, prepare(settings, corpus)


def run(settings: EmotionRecipe) -> FinetuneResult:
    corpus, prepared = opened(settings)
    return combine(settings, corpus, [run_fold(settings, corpus, fold, prepared) for fold in (2, 0, 1)])


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_tests_each_utterance_once_and_gives_the_result_file(folder, checkpoint, pretrained_on, system):
    result = run(recipe(folder, system, checkpoint))
    stored = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert FinetuneResult(**stored, predictions_csv=result.predictions_csv) == result
    assert (stored["system"], stored["corpus"], stored["protocol"]) == (system, "tones", "speakers3")
    assert (stored["utterances"], stored["speakers"], stored["seed"]) == (36, 6, 0)
    updates = 0 if system == "mean" else 6  # 18 utterances in batches of 6, twice
    assert [fold["updates"] for fold in stored["folds"]] == [updates] * 3
    assert len(stored["curves"]) == (0 if system == "mean" else 6)
    tested = [speaker for fold in stored["folds"] for speaker in fold["test_speakers"]]
    assert sorted(tested) == [f"voice{number}" for number in range(6)]
    rows = list(csv.DictReader(io.StringIO(result.predictions_csv)))
    assert [row["utterance"] for row in rows] == [f"{number:02}" for number in range(36)]
    truth, guess = (
        np.array([[float(row[name + suffix]) for name in ("activation", "valence", "dominance")] for row in rows])
        for suffix in ("", "_hat")
    )
    assert stored["ccc"] == pytest.approx(scores(truth, guess), abs=1e-4)
    assert stored["interval"]["mean"][0] <= stored["ccc"]["mean"] <= stored["interval"]["mean"][1]
    for fold in stored["folds"]:
        mine = [number for number, row in enumerate(rows) if row["fold"] == str(fold["fold"])]
        assert {rows[number]["speaker"] for number in mine} == set(fold["test_speakers"])
        assert fold["ccc"] == pytest.approx(scores(truth[mine], guess[mine]), abs=1e-4)


def test_what_can_be_heard_is_learnt_and_holds_for_new_speakers(tmp_path):
    result = run(recipe(put_corpus(tmp_path / "tones", each=20), "mfcc", epochs=40))
    assert min(result.ccc.values()) > 0.7


def test_the_constant_is_the_mean_of_the_training_speakers(folder):
    settings = recipe(folder, "mean")
    corpus = open_corpus(settings.corpus)
    result = run_fold(settings, corpus, 0)
    train, _, _ = result.split.rows(corpus.speakers)
    np.testing.assert_allclose(result.guess_UP, np.tile(corpus.labels_UP[train].mean(axis=0), (12, 1)))


@pytest.mark.parametrize("system", ["mfcc", "raw", "random", "precpc", "minicpc"])
@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_of_a_test_speaker_reaches_the_fit(folder, checkpoint, pretrained_on, system, frozen):
    # random and raw without a checkpoint: their level is then the corpus's own.
    settings = recipe(folder, system, checkpoint if system in ("precpc", "minicpc") else "")
    settings.encoder.frozen = frozen
    corpus, prepared = opened(settings)
    split = fold_splits(settings, corpus)[1]
    _, _, test = split.rows(corpus.speakers)
    noise = np.random.default_rng(1)
    inputs = list(prepared.inputs)
    for row in test:
        inputs[row] = (100 * noise.normal(0, 50, inputs[row].shape)).astype(inputs[row].dtype)
    result, spoilt = (
        run_fold(settings, corpus, 1, replace(prepared, inputs=each)) for each in (prepared.inputs, inputs)
    )
    assert spoilt.curve == result.curve and spoilt.best_epoch == result.best_epoch
    assert not np.allclose(spoilt.guess_UP, result.guess_UP)
    assert all(not set(split.test) & set(speakers) for speakers in pretrained_on)
    assert len(pretrained_on) == (2 if system == "minicpc" else 0)


def test_the_test_fold_is_heard_once_and_last(folder, monkeypatch):
    settings = recipe(folder, "mfcc")
    corpus, prepared = opened(settings)
    train, dev, test = fold_splits(settings, corpus)[0].rows(corpus.speakers)
    asked: list[list[int]] = []
    inputs = Source.inputs
    monkeypatch.setattr(Source, "inputs", lambda self, rows: asked.append(list(rows)) or inputs(self, rows))
    run_fold(settings, corpus, 0, prepared)
    assert asked.count(test) == 1 and asked[-1] == test
    assert all(rows in (train, dev) for rows in asked[:-1])


def test_a_fold_is_the_same_whenever_and_wherever_it_runs(folder, checkpoint):
    settings = recipe(folder, "precpc", checkpoint)
    corpus, prepared = opened(settings)
    torch.manual_seed(5)
    first = run_fold(settings, corpus, 2, prepared)
    again = run_fold(settings, corpus, 2)
    other = run_fold(replace(settings, seed=1), corpus, 2, prepared)
    assert first.curve == again.curve and first.split == other.split
    np.testing.assert_array_equal(first.guess_UP, again.guess_UP)
    assert not np.allclose(first.guess_UP, other.guess_UP)


def test_features_are_standardised_by_training_speakers_alone(folder):
    settings = recipe(folder, "mfcc")
    corpus, prepared = opened(settings)
    split = fold_splits(settings, corpus)[0]
    train, _, _ = split.rows(corpus.speakers)
    _, fit = start_fit(settings, corpus, prepared, split)
    frames = np.concatenate([prepared.inputs[row] for row in train]).astype(np.float64)
    np.testing.assert_allclose(fit.network.mean_C, frames.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fit.network.deviation_C, frames.std(axis=0), rtol=1e-5)


def test_frozen_features_are_those_of_each_utterance_alone(folder, checkpoint):
    corpus, prepared = opened(recipe(folder, "precpc", checkpoint))
    network, _ = load_encoder(checkpoint)
    for wave, c_TD in list(zip(read_waves(corpus, 10), prepared.inputs, strict=True))[:5]:
        with torch.inference_mode():
            alone = network.features(torch.from_numpy(wave.astype(np.float32) / 32768)[None])[1][0].numpy()
        np.testing.assert_allclose(c_TD, alone, atol=1e-5)
        assert len(c_TD) == len(wave) // 160


def test_random_and_raw_are_the_checkpoints_network_untrained(folder, checkpoint):
    known, _ = load_encoder(checkpoint)
    corpus, prepared = opened(recipe(folder, "random", checkpoint))
    untrained = build(TINY, 0, offset=float(known.offset), gain=float(known.gain))
    waves = read_waves(corpus, 10)
    np.testing.assert_allclose(prepared.inputs[0], encode(untrained, waves[:1], CPU)[0], atol=1e-5)
    settings = recipe(folder, "raw", checkpoint)
    settings.pretraining.model.encoder.channels = 5  # the checkpoint's count goes
    corpus, prepared = opened(settings)
    _, fit = start_fit(settings, corpus, prepared, fold_splits(settings, corpus)[0])
    assert fit.network.encoder.config == known.config
    settings.pretraining.model.encoder.channels = 6


def test_a_frozen_encoder_stays_and_a_trained_one_moves(folder, checkpoint):
    settings = recipe(folder, "precpc", checkpoint)
    settings.encoder.frozen = False
    corpus, prepared = opened(settings)
    before = features.encoder_digest(prepared.encoder)
    _, fit = start_fit(settings, corpus, prepared, fold_splits(settings, corpus)[0])
    assert features.encoder_digest(fit.network.encoder) == before
    list(fit)
    assert features.encoder_digest(fit.network.encoder) != before
    assert features.encoder_digest(prepared.encoder) == before  # other folds start from the checkpoint too


def test_the_level_brings_waveforms_to_zero_mean_and_unit_variance():
    rng = np.random.default_rng(0)
    waves = [rng.normal(300, 2000, count).astype(np.int16) for count in (1000, 5000)]
    offset, gain = wave_level(waves)
    scaled = (np.concatenate(waves) / 32768 - offset) * gain
    assert scaled.mean() == pytest.approx(0, abs=1e-9) and scaled.std() == pytest.approx(1)
    assert wave_level([np.zeros(10, np.int16)]) == (0, 1)


def test_statistics_do_not_cancel_far_from_zero():
    x_TC = (1e4 + np.random.default_rng(0).normal(0, 0.1, (1000, 2))).astype(np.float32)
    _, deviation = statistics([x_TC[:10], x_TC[10:]])
    np.testing.assert_allclose(deviation, x_TC.astype(np.float64).std(axis=0), rtol=1e-5)


def test_a_missing_checkpoint_is_refused_with_the_way_out(folder, tmp_path):
    corpus = open_corpus(recipe(folder, "mean").corpus)
    with pytest.raises(UserError, match=r"needs encoder\.checkpoint=RUN_DIR"):
        prepare(recipe(folder, "precpc"), corpus)
    with pytest.raises(UserError, match=r"no pretraining at encoder\.checkpoint=.*run `cpcscale pretrain`"):
        prepare(recipe(folder, "precpc", str(tmp_path / "none")), corpus)
    with pytest.raises(UserError, match=r'or pass encoder\.checkpoint=""'):
        prepare(recipe(folder, "raw", str(tmp_path / "none")), corpus)
    with pytest.raises(UserError, match="no checkpoint"):
        prepare(recipe(folder, "precpc", str(tmp_path)), corpus)


def test_an_unknown_system_is_refused():
    with pytest.raises(UserError, match="did you mean precpc"):
        EmotionRecipe(system="precp")


def test_more_folds_than_speakers_are_refused(folder):
    settings = recipe(folder, "mean")
    settings.protocol.folds = 7
    with pytest.raises(UserError, match="6 speakers cannot fill"):
        fold_splits(settings, open_corpus(settings.corpus))


def test_an_open_source_never_changes_what_is_shared(folder, checkpoint):
    settings = recipe(folder, "raw", checkpoint)
    corpus, prepared = opened(settings)
    source = open_source(settings, corpus, prepared, fold_splits(settings, corpus)[0])
    assert source.inputs([3])[0] is prepared.inputs[3]
