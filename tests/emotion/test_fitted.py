"""A recogniser that is saved and loaded says what it said in memory, and its fold's predictions are its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import speech
from made_voices import put_checkpoint, put_corpus, recipe

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.inputs import prepare
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


@pytest.mark.parametrize(("system", "head"), GRID, ids=lambda each: each)
def test_what_is_saved_and_loaded_predicts_the_test_rows_of_its_fold(place, tmp_path, system, head):
    of = made(place, system, head)
    prepared = prepare(of, open_corpus(of.corpus))
    fold = run_fold(of, prepared, 0, keep=True)
    url = str(tmp_path / "recogniser")
    save_recogniser(url, fold.recogniser, {"protocol": "speakers3"}, "# a card\n")
    loaded, scores = load_recogniser(url)
    assert scores == {"protocol": "speakers3"}
    rows = fold.split.test_rows
    waves = (
        [prepared.waves.whole(row) for row in rows]
        if prepared.waves is not None
        else [np.zeros(1, np.int16)] * len(rows)
    )
    in_memory = fold.recogniser.predict(waves)
    np.testing.assert_allclose(loaded.predict(waves), in_memory, atol=1e-6)
    np.testing.assert_allclose(loaded.in_units(in_memory), fold.guess_UP, atol=1e-5)
    alone = np.concatenate([loaded.predict([wave]) for wave in waves])
    np.testing.assert_allclose(alone, in_memory, atol=1e-5)
