"""A recogniser that is saved and loaded says what it said in memory, and its fold's predictions are its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import speech
from made_voices import put_checkpoint, put_corpus, recipe

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.protocol.folds import FINAL, final_split, fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.systems import SYSTEMS
from cpcscale.serve.folder import load_recogniser, save_recogniser

# Each valid system and head; an encoder that is trained, too.
GRID = [
    (name, head) for name, system in SYSTEMS.items() for head in system.regressors if (name, head) != ("raw", "svr")
]
GRID.append(("precpc", "trained"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recognisers")
    put_corpus(folder / "tones")
    return folder, put_checkpoint(folder / "pretrained")


def made(place, system: str, head: str) -> EmotionRecipe:
    folder, checkpoint = place
    base = recipe(folder / "tones", system, checkpoint, refit=True)
    if system == "minicpc":
        base = replace(base, pretraining=speech.recipe(train__steps=2, train__batch=4, train__lanes=2))
        base = replace(base, encoder=replace(base.encoder, checkpoint=""))
    if head == "trained":
        return replace(base, encoder=replace(base.encoder, frozen=False))
    return replace(base, head="svr" if head != SYSTEMS[system].regressors[0] else "auto")


def check(of: EmotionRecipe, folder: Path) -> None:
    """The first fold's recogniser, saved and loaded, predicts its test rows as it did, together and alone."""
    prepared = prepare(of, open_corpus(of.corpus))
    fold = run_fold(of, prepared, 0, keep=True)
    url = str(folder / "recogniser")
    save_recogniser(url, fold.recogniser, {"protocol": "speakers3"}, "# a card\n")
    loaded, scores = load_recogniser(url)
    assert scores == {"protocol": "speakers3"}
    waves = [prepared.waves.whole(row) if prepared.waves else np.zeros(1, np.int16) for row in fold.split.test_rows]
    in_memory = fold.recogniser.predict(waves)
    np.testing.assert_allclose(loaded.predict(waves), in_memory, atol=1e-6)
    np.testing.assert_allclose(loaded.in_units(in_memory), fold.guess_UP, atol=1e-5)
    alone = np.concatenate([loaded.predict([wave]) for wave in waves])
    np.testing.assert_allclose(alone, in_memory, atol=1e-5)


@pytest.mark.parametrize(("system", "head"), GRID, ids=lambda each: each)
def test_what_is_saved_and_loaded_predicts_the_test_rows_of_its_fold(place, tmp_path, system, head):
    check(made(place, system, head), tmp_path)


@pytest.mark.parametrize("layer", ["c", "mix"])
def test_a_network_of_the_transformers_library_is_saved_too(place, tmp_path, layer):
    pytest.importorskip("transformers")
    from hf_networks import put_network

    base = made(place, "precpc", "attention")
    check(replace(base, encoder=replace(base.encoder, checkpoint=put_network(tmp_path / "hf"), layer=layer)), tmp_path)


def test_the_mixed_layers_of_a_cpc_network_and_long_utterances_are_saved_too(place, tmp_path):
    base = made(place, "precpc", "attention")
    # Windows of .2 s, so that each utterance has several.
    base = replace(base, corpus=replace(base.corpus, max_s=0.2))
    check(replace(base, encoder=replace(base.encoder, layer="mix")), tmp_path)


@pytest.mark.parametrize("speakers", [True, False], ids=["speakers", "none known"])
def test_the_final_split_has_all_labelled_utterances_and_tests_nobody(place, speakers):
    of = made(place, "functionals", "svr")
    corpus = open_corpus(of.corpus)
    if not speakers:
        corpus = replace(corpus, utterances=tuple(replace(one, speaker="") for one in corpus.utterances))
        of = replace(of, protocol=replace(of.protocol, split="random3"))
    split = final_split(of, corpus, fold_splits(of, corpus))
    assert sorted(split.train_rows + split.dev_rows) == list(range(len(corpus.utterances)))
    assert (split.fold, split.test_rows) == (FINAL, ()) and not set(split.train) & set(split.dev)


def test_official_publishes_the_very_recogniser_that_was_scored(place):
    of = made(place, "mfcc", "attention")
    corpus = open_corpus(of.corpus)
    parts = ["train", "train", "dev", "test1"]
    utterances = [replace(one, partition=parts[int(one.speaker[-1]) % 4]) for one in corpus.utterances]
    of = replace(of, protocol=replace(of.protocol, split="official"))
    prepared = prepare(of, replace(corpus, utterances=tuple(utterances)))
    scored, final = (run_fold(of, prepared, fold, keep=True) for fold in (0, FINAL))
    assert (final.split.fold, len(final.guess_UP)) == (FINAL, 0)
    for name, array in scored.recogniser.arrays().items():
        np.testing.assert_array_equal(final.recogniser.arrays()[name], array)
