"""A fusion is a system as any other: its parts are prepared as they are alone, and each weighs the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_voices import recipe

from cpcscale import config
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.finetune_result import combine_folds
from cpcscale.emotion.inputs import fold_inputs, prepare
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.many_runs import metric_name
from cpcscale.experiments.many_runs_config import ReproduceConfig, depends_on_seed

THREE = "precpc+functionals+prosody"


def of(folder, checkpoint, system: str = THREE, **keys) -> EmotionRecipe:
    return replace(recipe(folder, system, checkpoint), **{"prosody": "pitch", "readout": "components", **keys})


@pytest.mark.parametrize(
    ("keys", "widths"),
    [
        ({}, [(48, 48), (65, 0), (31, 0)]),
        ({"duration": True}, [(49, 48), (66, 0), (32, 0)]),
        ({"readout": "slopes"}, [(48, 0), (65, 0), (31, 0)]),
        ({"readout": "statistics"}, [(40, 0), (66, 0), (32, 0)]),
    ],
    ids=["components", "duration", "slopes", "statistics"],
)
def test_its_vectors_are_those_of_its_systems_alone_side_by_side(folder, checkpoint, keys, widths):
    whole = of(folder, checkpoint, **keys)
    corpus = open_corpus(whole.corpus)
    split = fold_splits(whole, corpus).splits[0]
    fused = fold_inputs(whole, prepare(whole, corpus), split)
    assert [(block.width, block.reduced) for block in fused.blocks] == widths
    alone = []
    for system in THREE.split("+"):
        one = replace(whole, system=system, head="svr")
        alone.append(fold_inputs(one, prepare(one, corpus), split).vectors([3, 5]))
    np.testing.assert_array_equal(fused.vectors([3, 5]), np.concatenate(alone, axis=1))


def test_it_is_scored_under_test_conditions_as_its_recogniser_predicts(folder, checkpoint):
    whole = of(folder, checkpoint, "mfcc+functionals", test_conditions=["gain-12"])
    prepared = prepare(whole, open_corpus(whole.corpus))
    folds = [run_fold(whole, prepared, number, keep=True) for number in range(3)]
    degraded = prepared.conditions["gain-12"].parts[0].waves
    waves = [degraded.whole(row) for row in folds[0].split.test_rows]
    guess_UP = folds[0].recogniser.predict(waves).unit_UP
    np.testing.assert_allclose(folds[0].recogniser.in_units(guess_UP), folds[0].conditions["gain-12"], atol=1e-5)
    result = combine_folds(whole, prepared, folds)
    assert result.conditions["gain-12"]["change"]["mean"] < 0 < result.ccc["mean"]


def test_the_row_of_a_result_says_which_prosody_it_has(folder, checkpoint):
    assert of(folder, checkpoint).definition.shown(of(folder, checkpoint)) == "precpc+functionals+prosody (pitch)"
    chosen = of(folder, checkpoint, "prosody", prosody="auto")
    assert chosen.definition.shown(chosen) in ("prosody (pitch)", "prosody (egemaps)")


def test_speakers_are_scaled_in_each_part(folder, checkpoint):
    whole = of(folder, checkpoint, "mfcc+functionals", speaker_norm=True)
    assert whole.marks == ["SPEAKER-ADAPTED"]
    corpus = open_corpus(whole.corpus)
    source = fold_inputs(whole, prepare(whole, corpus), fold_splits(whole, corpus).splits[0])
    own = [row for row, speaker in enumerate(corpus.speakers) if speaker == corpus.speakers[0]]
    np.testing.assert_allclose(source.vectors(own)[:, -65:].mean(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"system": "precpc+rawest"}, "system='rawest'"),
        ({"system": "functionals+mean"}, "system='mean'"),
        ({"system": "functionals+functionals"}, "names a system twice"),
        ({"system": "functionals+"}, "system=''"),
        ({"system": "raw+functionals"}, "this encoder is trained"),
        ({"encoder": {"frozen": False}}, "this encoder is trained"),
        ({"encoder": {"layer": "mix"}}, "learnt by the attention head"),
        ({"head": "attention"}, "head=attention takes frames of one system"),
        ({"readout": "statistics", "duration": True}, "duration=true is for readout=slopes"),
        ({"readout": "quantiles"}, "Invalid value 'quantiles'"),
    ],
)
def test_what_a_fusion_or_a_readout_cannot_be_is_said(keys, why):
    with pytest.raises(UserError, match=why):
        config.build(EmotionRecipe, {"system": "precpc+functionals"} | keys)


def test_a_table_can_have_fusions_beside_other_systems():
    table = config.load(
        ReproduceConfig,
        None,
        [
            "systems=[functionals,random+functionals,functionals+prosody]",
            "reference=functionals",
            "overrides={random+functionals: {readout: components}}",
        ],
    )
    assert [table.recipe(system).readout for system in table.systems] == ["statistics", "components", "statistics"]
    assert [depends_on_seed(table.recipe(system)) for system in table.systems] == [False, True, False]
    with pytest.raises(UserError, match="systems='rawest'"):
        config.load(ReproduceConfig, None, ["systems=[functionals,rawest+functionals]", "reference=functionals"])


def test_the_tracking_store_takes_the_metric_of_a_fusion():
    validate = pytest.importorskip("mlflow.utils.validation")._validate_metric_name
    validate(metric_name(THREE))


def test_marks_and_what_it_takes_are_those_of_its_parts():
    keys = {"system": "minicpc+functionals", "pretraining_on": "corpus"}
    made = config.build(EmotionRecipe, keys)
    assert made.marks == ["TRANSDUCTIVE"] and made.definition.pretrains and made.definition.takes_network
    precpc = config.build(EmotionRecipe, {"system": THREE, "encoder": {"selected_on_test": True}})
    assert precpc.definition.needs_checkpoint and precpc.definition.takes_weights
    classic = config.build(EmotionRecipe, {"system": "functionals+prosody"})
    assert not classic.definition.takes_network and classic.regressor == "svr"
