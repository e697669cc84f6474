import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from made_voices import TINY, put_corpus, recipe

from cpcscale import config
from cpcscale.emotion.batching import predict
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import run_fold, start_fit
from cpcscale.emotion.encoders.networks import WindowEncoder, encoder_digest, measure_level
from cpcscale.emotion.finetune_result import FinetuneResult, combine_folds
from cpcscale.emotion.inputs import FoldInputs, PreparedCorpus, fold_inputs, prepare, statistics
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import SYSTEMS, EmotionRecipe
from cpcscale.emotion.scores.ccc_intervals import scores
from cpcscale.errors import UserError
from cpcscale.handmade.statistics import summarise
from cpcscale.model.cpc import build
from cpcscale.train.checkpoint import load_encoder

CPU = torch.device("cpu")


@pytest.fixture
def pretrained_on(monkeypatch) -> list[list[str]]:
    """minicpc's pretraining replaced by a fresh network; the speakers of each call."""
    from cpcscale.emotion.encoders import networks

    calls: list[list[str]] = []

    def pretrain_on(sources, recipe, folder):
        assert Path(folder).is_dir()
        calls.append(sorted({source.group for source in sources}))
        return build(recipe.model, seed=3)

    monkeypatch.setattr(networks, "pretrain_on", pretrain_on)
    return calls


def opened(settings: EmotionRecipe) -> tuple[Corpus, PreparedCorpus]:
    corpus = open_corpus(settings.corpus)
    return corpus, prepare(settings, corpus)


def run(settings: EmotionRecipe) -> FinetuneResult:
    _, prepared = opened(settings)
    return combine_folds(settings, prepared, [run_fold(settings, prepared, fold) for fold in (2, 0, 1)])


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_tests_each_utterance_once_and_gives_the_result_file(folder, checkpoint, pretrained_on, system):
    result = run(recipe(folder, system, checkpoint))
    stored = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert FinetuneResult(**stored, predictions_csv=result.predictions_csv) == result
    assert (stored["system"], stored["corpus"], stored["protocol"]) == (system, "tones", "speakers3")
    assert (stored["utterances"], stored["speakers"], stored["seed"]) == (36, 6, 0)
    trained = system not in ("mean", "duration", "functionals", "prosody")
    updates = 6 if trained else 0  # 18 utterances in batches of 6, twice
    assert [fold["updates"] for fold in stored["folds"]] == [updates] * 3
    assert len(stored["curves"]) == (6 if trained else 0)
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
    result = run_fold(settings, prepare(settings, corpus), 0)
    train, _, _ = result.split.rows()
    np.testing.assert_allclose(result.guess_UP, np.tile(corpus.labels_UP[train].mean(axis=0), (12, 1)))


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system != "mean"])
@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_of_a_test_speaker_reaches_the_fit(folder, checkpoint, pretrained_on, tmp_path, system, frozen):
    # random and raw without a checkpoint: their level is then the corpus's own.
    settings = recipe(folder, system, checkpoint if system in ("precpc", "minicpc") else "")
    settings.encoder.frozen = frozen
    corpus, prepared = opened(settings)
    split = fold_splits(settings, corpus).splits[1]
    other = tmp_path / "tones"
    shutil.copytree(folder, other)
    noise = np.random.default_rng(1)
    for row in split.test_rows:
        soundfile.write(other / Path(corpus.utterances[row].path).name, noise.normal(0, 0.1, 9000), 16_000)
    changed = replace(settings, corpus=replace(settings.corpus, path=str(other)))
    result, spoilt = run_fold(settings, prepared, 1), run_fold(changed, opened(changed)[1], 1)
    assert spoilt.curve == result.curve and spoilt.chosen == result.chosen
    assert not np.allclose(spoilt.guess_UP, result.guess_UP)
    assert all(not set(split.test) & set(speakers) for speakers in pretrained_on)
    assert len(pretrained_on) == (2 if system == "minicpc" else 0)


def test_the_test_fold_is_heard_once_and_last(folder, monkeypatch):
    settings = recipe(folder, "mfcc")
    corpus, prepared = opened(settings)
    train, dev, test = fold_splits(settings, corpus).splits[0].rows()
    asked: list[list[int]] = []
    inputs = FoldInputs.inputs
    monkeypatch.setattr(FoldInputs, "inputs", lambda self, rows: asked.append(list(rows)) or inputs(self, rows))
    run_fold(settings, prepared, 0)
    assert asked.count(test) == 1 and asked[-1] == test
    assert all(rows in (train, dev) for rows in asked[:-1])


def test_a_fold_is_the_same_whenever_and_wherever_it_runs(folder, checkpoint):
    settings = recipe(folder, "precpc", checkpoint)
    corpus, prepared = opened(settings)
    torch.manual_seed(5)
    first = run_fold(settings, prepared, 2)
    again = run_fold(settings, prepare(settings, corpus), 2)
    other = run_fold(replace(settings, seed=1), prepared, 2)
    assert first.curve == again.curve and first.split == other.split
    np.testing.assert_array_equal(first.guess_UP, again.guess_UP)
    assert not np.allclose(first.guess_UP, other.guess_UP)


def test_features_are_standardised_by_training_speakers_alone(folder):
    settings = recipe(folder, "mfcc")
    corpus, prepared = opened(settings)
    split = fold_splits(settings, corpus).splits[0]
    _, fit = start_fit(settings, prepared, split)
    frames = np.concatenate([prepared.inputs[row][0] for row in split.train_rows]).astype(np.float64)
    np.testing.assert_allclose(fit.network.mean_C, frames.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(fit.network.deviation_C, frames.std(axis=0), rtol=1e-5)


def test_frozen_features_are_those_of_each_utterance_alone(folder, checkpoint):
    _, prepared = opened(recipe(folder, "precpc", checkpoint))
    network, _ = load_encoder(checkpoint)
    for (wave,), (c_TD,) in list(zip(prepared.waves, prepared.inputs, strict=True))[:5]:
        with torch.inference_mode():
            alone = network.features(torch.from_numpy(wave.astype(np.float32) / 32768)[None])[1][0].numpy()
        np.testing.assert_allclose(c_TD, alone, atol=1e-5)
        assert len(c_TD) == len(wave) // 160


def test_random_and_raw_are_the_checkpoints_network_untrained(folder, checkpoint):
    known, _ = load_encoder(checkpoint)
    corpus, prepared = opened(recipe(folder, "random", checkpoint))
    untrained = build(TINY, 0, offset=float(known.offset), gain=float(known.gain))
    encode = WindowEncoder(untrained, "c", CPU)
    np.testing.assert_allclose(prepared.inputs[0][0], encode(prepared.waves[0])[0], atol=1e-5)
    settings = recipe(folder, "raw", checkpoint)
    settings.pretraining.model.encoder.channels = 5  # the checkpoint's count goes
    corpus, prepared = opened(settings)
    _, fit = start_fit(settings, prepared, fold_splits(settings, corpus).splits[0])
    assert fit.network.encoder.config == known.config
    settings.pretraining.model.encoder.channels = 6


def test_a_frozen_encoder_stays_and_a_trained_one_moves(folder, checkpoint):
    settings = recipe(folder, "precpc", checkpoint)
    settings.encoder.frozen = False
    corpus, prepared = opened(settings)
    before = encoder_digest(prepared.encoder)
    _, fit = start_fit(settings, prepared, fold_splits(settings, corpus).splits[0])
    assert encoder_digest(fit.network.encoder) == before
    list(fit)
    assert encoder_digest(fit.network.encoder) != before
    assert encoder_digest(prepared.encoder) == before  # other folds start from the checkpoint too


def test_the_level_brings_waveforms_to_zero_mean_and_unit_variance():
    rng = np.random.default_rng(0)
    waves = [rng.normal(300, 2000, count).astype(np.int16) for count in (1000, 5000)]
    offset, gain = measure_level(waves)
    scaled = (np.concatenate(waves) / 32768 - offset) * gain
    assert scaled.mean() == pytest.approx(0, abs=1e-9) and scaled.std() == pytest.approx(1)
    assert measure_level([np.zeros(10, np.int16)]) == (0, 1)


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
    settings.protocol.split = "speakers7"
    with pytest.raises(UserError, match="6 speakers cannot fill"):
        fold_splits(settings, open_corpus(settings.corpus))


@pytest.mark.parametrize("layer", ["z", "c", "both"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_recogniser_hears_the_layer_asked_for(folder, checkpoint, layer, frozen):
    settings = recipe(folder, "precpc", checkpoint)
    settings.encoder.layer, settings.encoder.frozen = layer, frozen
    corpus, prepared = opened(settings)
    _, fit = start_fit(settings, prepared, fold_splits(settings, corpus).splits[0])
    width = {"z": 6, "c": 8, "both": 14}[layer]
    assert (fit.network if frozen else fit.network.recogniser).mean_C.shape == (width,)
    list(fit)


@pytest.mark.parametrize("system", ["mfcc", "random", "precpc"])
def test_a_support_vector_head_hears_the_functionals_of_frames(folder, checkpoint, system):
    settings = recipe(folder, system, checkpoint)
    settings.head = "svr"
    corpus, prepared = opened(settings)
    source = fold_inputs(settings, prepared, fold_splits(settings, corpus).splits[0])
    expected = np.stack([summarise(prepared.inputs[row][0]) for row in (3, 5)])
    np.testing.assert_allclose(source.vectors([3, 5]), expected)
    assert run_fold(settings, prepared, 0).chosen["C"] > 0


def test_an_utterance_of_several_windows_is_scored_by_all_of_them_each_moment_once(folder):
    settings = recipe(folder, "mfcc")
    settings.corpus.max_s = 0.3
    corpus, prepared = opened(settings)
    assert max(len(parts) for parts in prepared.inputs) > 2
    source, fit = start_fit(settings, prepared, fold_splits(settings, corpus).splits[0])
    list(fit)
    network, row = fit.finish(), int(np.argmax([len(parts) for parts in prepared.inputs]))
    whole = predict(network, source.inputs([row]), CPU, shares=source.shares([row]))
    each = np.stack([predict(network, [(window,)], CPU)[0] for window in prepared.inputs[row]])
    np.testing.assert_allclose(whole[0], prepared.waves.shares(row) @ each, atol=1e-6)


def test_what_a_protocol_leaves_out_and_what_it_tests_is_said(tmp_path):
    folder = put_corpus(tmp_path / "tones")
    table = folder / "manifest.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace("voice0", "")
    table.write_text("\n".join(lines) + "\n")
    result = run(recipe(folder, "mean"))
    assert (result.utterances, result.unknown) == (35, 1)
    assert result.dropped == {"no speaker and no recording": 1}
    assert "00" not in {row["utterance"] for row in csv.DictReader(io.StringIO(result.predictions_csv))}


def test_random_folds_are_leaky_and_say_so(folder):
    settings = recipe(folder, "mean")
    settings.protocol.split = "random3"
    result = run(settings)
    assert (result.protocol, result.marks) == ("random3", ["LEAKY"])


def test_the_owners_partitions_are_scored_each_by_itself(tmp_path):
    folder = put_corpus(tmp_path / "tones")
    table = folder / "manifest.csv"
    head, *lines = table.read_text().splitlines()
    parts = {"voice0": "test1", "voice1": "test2", "voice2": "dev"}
    lines = [f"{line},{parts.get(line.split(',')[1], 'train')}" for line in lines]
    table.write_text("\n".join([f"{head},partition", *lines]) + "\n")
    settings = recipe(folder, "mfcc")
    settings.protocol.split = "official"
    _, prepared = opened(settings)
    result = combine_folds(settings, prepared, [run_fold(settings, prepared, 0)])
    assert list(result.ccc_by_part) == ["test1", "test2"]
    assert result.ccc == result.ccc_by_part["test1"] and result.utterances == 6
    assert result.folds[0]["test_utterances"] == 12


def test_categories_are_guessed_for_new_speakers_where_asked_for(tmp_path):
    folder = put_corpus(tmp_path / "tones")
    settings = recipe(folder, "functionals")
    settings.classify = True
    with pytest.raises(UserError, match=r"classify=true, but corpus tones has no categories"):
        opened(settings)
    table = folder / "manifest.csv"
    head, *lines = table.read_text().splitlines()
    loud = ["loud" if float(line.split(",")[2]) > 3 else "soft" for line in lines]
    lines = [f"{line},{word}" for line, word in zip(lines, loud, strict=True)]
    table.write_text("\n".join([f"{head},category", *lines]) + "\n")
    result = run(settings)
    assert result.recall > 0.8
    rows = list(csv.DictReader(io.StringIO(result.predictions_csv)))
    assert {row["category_hat"] for row in rows} == {"loud", "soft"}


def test_combinations_that_cannot_be_are_refused_with_the_way_out():
    for keys, message in (
        ({"system": "functionals", "head": "attention"}, r"system=functionals has none: use head=auto"),
        ({"system": "raw", "head": "svr"}, r"head=svr takes fixed features"),
        ({"system": "raw", "classify": True}, r"classify=true takes fixed features"),
        (
            {"fit": {"augment": {"enabled": True}}},
            r"system=precpc trains on fixed features: use encoder\.frozen",
        ),
        ({"protocol": {"split": "speakers"}}, r"protocol='speakers' is unknown: choose speakers5"),
    ):
        with pytest.raises(UserError, match=message):
            config.build(EmotionRecipe, keys)
