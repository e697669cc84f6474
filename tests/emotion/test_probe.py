"""A probe is a fine-tuning in small: the same figures each time, and nothing of it is kept but they."""

from dataclasses import replace

import pytest
from made_voices import TINY, put_checkpoint, put_corpus

from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.finetune_result import combine_folds
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.probe import open_waves, probe, probe_recipe
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.errors import UserError
from cpcscale.model.cpc import build
from cpcscale.train.checkpoint import load_encoder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Three folds of six voices, with a cache of its own; some utterances are longer than a window."""
    folder = tmp_path_factory.mktemp("probe")
    corpus = CorpusConfig(path=str(put_corpus(folder / "tones")), max_s=0.4)
    return probe_recipe(corpus, "speakers3", AudioCacheConfig(path=str(folder / "cache")))


def test_the_figures_are_those_of_a_fine_tuning_with_the_same_head(recipe, tmp_path):
    checkpoint, corpus = put_checkpoint(tmp_path / "run"), open_corpus(recipe.corpus)
    network, _ = load_encoder(checkpoint)
    ccc = probe(recipe, open_waves(recipe, corpus), network)
    whole = replace(
        recipe, encoder=replace(recipe.encoder, checkpoint=checkpoint), audio_cache=AudioCacheConfig(enabled=False)
    )
    prepared = prepare(whole, corpus)
    folds = [run_fold(whole, prepared, fold) for fold in range(len(fold_splits(whole, corpus).splits))]
    assert ccc == pytest.approx(combine_folds(whole, prepared, folds).ccc, abs=1e-6)
    assert set(ccc) == {"activation", "valence", "dominance", "mean"}


def test_it_draws_nothing_and_tells_networks_apart(recipe):
    waves = open_waves(recipe, open_corpus(recipe.corpus))
    one, other = (build(TINY, seed, offset=0.01, gain=3.0) for seed in (1, 2))
    assert probe(recipe, waves, one) == probe(recipe, waves, one)
    assert probe(recipe, waves, one) != probe(recipe, waves, other)


def test_no_feature_of_a_checkpoint_stays_in_the_cache(recipe):
    waves = open_waves(recipe, open_corpus(recipe.corpus))
    before = {path.name for path in recipe.audio_cache.folder.iterdir()}
    probe(recipe, waves, build(TINY, 3, offset=0.0, gain=1.0))
    assert {path.name for path in recipe.audio_cache.folder.iterdir()} == before


def test_too_few_speakers_for_the_protocol_are_refused(recipe):
    with pytest.raises(UserError, match="6 speakers cannot fill 7 folds"):
        fold_splits(probe_recipe(recipe.corpus, "speakers7", recipe.audio_cache), open_corpus(recipe.corpus))
