"""A recogniser that is saved and loaded says what it said in memory, and its fold's predictions are its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import speech
from made_voices import put_checkpoint, put_corpus, recipe

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.protocol.folds import FINAL, final_split, fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.systems import SYSTEMS
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig
from cpcscale.model.encoder import EncoderConfig
from cpcscale.serve.folder import SavedRecogniser, load_recogniser, save_recogniser

# Each valid system and head; an encoder that is trained, too.
GRID = [
    (name, head)
    for name, system in SYSTEMS.items()
    for head in system.regressors
    if name != "raw" or head == "attention"
]
GRID.append(("precpc", "trained"))
# Of networks over log mel energies, whose bands are measured on the fold's training speakers.
GRID += [("random", "log mel"), ("minicpc", "log mel")]
# Principal components, and systems side by side.
READOUTS = [
    ("precpc", "svr", {"readout": "components"}),
    ("mfcc", "ridge", {"readout": "components", "duration": True}),
    ("functionals", "svr", {"readout": "components"}),
    ("mfcc", "svr", {"readout": "slopes"}),
    ("precpc", "ridge", {"readout": "slopes+components"}),
    ("precpc+functionals+prosody", "svr", {"readout": "slopes+components", "prosody": "pitch"}),
    ("precpc+functionals", "svr", {"readout": "components", "duration": True}),
    ("functionals+prosody", "ridge", {"readout": "components"}),
    ("random+functionals+mfcc", "svr", {}),
]
SCORES = {
    "system": "any",
    "corpus": "tones",
    "protocol": "speakers3",
    "marks": [],
    "interval": None,
    "versions": {},
    "ccc": {"activation": 0.0, "valence": 0.0, "dominance": 0.0, "mean": 0.0},
    "learnt_from": {"utterances": 1, "speakers": 1},
    "tested_on": {"utterances": 1, "speakers": 1},
    "licences": {"corpus tones": "unknown"},
    "training_rows": 3,
}


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
    if head == "log mel":
        encoder = EncoderConfig(kind="logmel", channels=6)
        pretraining = replace(base.pretraining, model=ModelConfig(encoder=encoder, context=ContextConfig(width=8)))
        return replace(base, pretraining=pretraining, encoder=replace(base.encoder, checkpoint=""))
    if head == "trained":
        return replace(base, encoder=replace(base.encoder, frozen=False))
    return replace(base, head=head if head != "mean" else "auto")


def recipe_without_refit(of: EmotionRecipe) -> EmotionRecipe:
    return replace(of, fit=replace(of.fit, refit=False))


def check(of: EmotionRecipe, folder: Path, corpus: Corpus | None = None) -> None:
    """The first fold's recogniser, saved and loaded, predicts its test rows as it did, together and alone."""
    prepared = prepare(of, corpus or open_corpus(of.corpus))
    fold = run_fold(of, prepared, 0, keep=True)
    url = str(folder / "recogniser")
    save_recogniser(url, SavedRecogniser(fold.recogniser, SCORES))
    saved = load_recogniser(url)
    loaded = saved.fitted
    assert saved.scores == SCORES
    waves = [prepared.waves.whole(row) if prepared.waves else np.zeros(1, np.int16) for row in fold.split.test_rows]
    in_memory, again = fold.recogniser.predict(waves), loaded.predict(waves)
    np.testing.assert_allclose(again.unit_UP, in_memory.unit_UP, atol=1e-6)
    np.testing.assert_allclose(loaded.in_units(in_memory.unit_UP), fold.guess_UP, atol=1e-5)
    np.testing.assert_allclose(again.distance_U, fold.distance_U, rtol=1e-4)
    assert again.classes_U == in_memory.classes_U == fold.classes_U
    alone = [loaded.predict([wave]) for wave in waves]
    np.testing.assert_allclose(np.concatenate([each.unit_UP for each in alone]), in_memory.unit_UP, atol=1e-5)


@pytest.mark.parametrize(("system", "head"), GRID, ids=lambda each: each)
def test_what_is_saved_and_loaded_predicts_the_test_rows_of_its_fold(place, tmp_path, system, head):
    check(made(place, system, head), tmp_path)


@pytest.mark.parametrize(("system", "head", "keys"), READOUTS, ids=lambda each: each if isinstance(each, str) else "")
def test_components_and_fusions_are_saved_too_also_of_long_utterances(place, tmp_path, system, head, keys):
    base = made(place, system, head)
    # Windows of .2 s, so that each utterance has several.
    check(replace(base, corpus=replace(base.corpus, max_s=0.2), **keys), tmp_path)
    kept = load_recogniser(str(tmp_path / "recogniser")).fitted.head.scale.arrays()
    assert kept and {array.dtype for array in kept.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize(
    ("system", "keys"), [("precpc", {}), ("precpc+functionals", {"readout": "components"})], ids=["alone", "fused"]
)
def test_the_classifier_is_saved_with_its_classes(place, tmp_path, system, keys):
    of = replace(made(place, system, "auto"), classify=True, svm_search=False, **keys)
    corpus = open_corpus(of.corpus)
    utterances = [replace(one, category="abc"[row % 3]) for row, one in enumerate(corpus.utterances)]
    check(of, tmp_path, replace(corpus, utterances=tuple(utterances)))
    assert load_recogniser(str(tmp_path / "recogniser")).fitted.classifier.classes == ("a", "b", "c")


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
    scored, final = (run_fold(of, prepared, fold, keep=True, publish=True) for fold in (0, FINAL))
    # What its intervals rest on: the development speakers, by a fit that has not learnt from them.
    apart = final.calibration
    assert apart.split.test_rows == scored.split.dev_rows and apart.split.train_rows == scored.split.train_rows
    assert len(apart.distance_U) == len(apart.guess_UP) == len(scored.split.dev_rows) and scored.calibration is None
    same = run_fold(recipe_without_refit(of), prepared, 0, keep=True).recogniser.predict(
        [prepared.waves.whole(row) for row in scored.split.dev_rows]
    )
    np.testing.assert_allclose(prepared.corpus.from_unit(same.unit_UP), apart.guess_UP, atol=1e-5)
    assert (final.split.fold, len(final.guess_UP)) == (FINAL, 0)
    for name, array in scored.recogniser.arrays().items():
        np.testing.assert_array_equal(final.recogniser.arrays()[name], array)
