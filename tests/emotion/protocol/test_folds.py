from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_voices import put_corpus, recipe

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, Utterance
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.protocol.splits import SplitRow, make_folds, with_label_share
from cpcscale.emotion.recipe import EmotionRecipe, ProtocolConfig
from cpcscale.errors import UserError

KEYS = [f"utterance{number}" for number in range(150)]
SPEAKERS = [f"voice{number * number % 11}" for number in range(150)]
ROWS = [SplitRow(key=key, speaker=speaker) for key, speaker in zip(KEYS, SPEAKERS, strict=True)]
PROTOCOLS = ("speakers3", "loso", "random3")


def folds(protocol: str):
    return make_folds(ROWS, protocol, dev_share=0.25, seed=0)


@given(st.sampled_from(PROTOCOLS), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 3))
def test_a_share_holds_every_smaller_one_and_the_test_part_stays(protocol, one, other, seed):
    whole = folds(protocol)
    small, large = (with_label_share(whole, KEYS, share, seed) for share in sorted((one, other)))
    for before, less, more in zip(whole.splits, small.splits, large.splits, strict=True):
        assert set(less.train_rows) <= set(more.train_rows) <= set(before.train_rows)
        assert set(less.dev_rows) <= set(more.dev_rows) <= set(before.dev_rows)
        assert less.test_rows == more.test_rows == before.test_rows
        assert (less.train, less.dev, less.test) == (before.train, before.dev, before.test)


@given(st.sampled_from(PROTOCOLS), st.floats(0.01, 1))
def test_each_speaker_keeps_that_share_and_at_least_one(protocol, share):
    whole = folds(protocol)
    for before, after in zip(whole.splits, with_label_share(whole, KEYS, share, 0).splits, strict=True):
        for part in ("train_rows", "dev_rows"):
            had, has = (Counter(SPEAKERS[row] for row in getattr(split, part)) for split in (before, after))
            assert has == {speaker: max(1, round(share * count)) for speaker, count in had.items()}


def test_all_is_what_it_was_and_the_draw_is_keyed_by_the_seed_and_the_names_not_by_their_order():
    whole = folds("speakers3")
    assert with_label_share(whole, KEYS, 1.0, 0) is whole
    half = with_label_share(whole, KEYS, 0.5, 0)
    assert half.splits[0].train_rows != with_label_share(whole, KEYS, 0.5, 1).splits[0].train_rows
    again = with_label_share(make_folds(ROWS[::-1], "speakers3", dev_share=0.25, seed=0), KEYS[::-1], 0.5, 0)
    for split, turned in zip(half.splits, again.splits, strict=True):
        assert {KEYS[row] for row in split.train_rows} == {KEYS[::-1][row] for row in turned.train_rows}


def test_a_recipe_is_trained_on_the_share_of_its_protocol(tmp_path):
    settings = recipe(put_corpus(tmp_path / "tones"), "mean")
    corpus = open_corpus(settings.corpus)
    half = replace(settings, protocol=replace(settings.protocol, train_share=0.5))
    whole, less = fold_splits(settings, corpus).splits[1], fold_splits(half, corpus).splits[1]
    assert (len(less.train_rows), len(less.dev_rows)) == (len(whole.train_rows) // 2, len(whole.dev_rows) // 2)
    assert less.test_rows == whole.test_rows


@pytest.mark.parametrize("share", [0, -0.1, 1.01])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(UserError, match=r"protocol\.train_share=.* is not a share"):
        ProtocolConfig(train_share=share)


@pytest.mark.parametrize(
    ("valence", "words"),
    [
        ([6.0, 7.0, 8.0], r"most labels of valence are outside corpus\.scale=\[1,5\], they go from 6 to 8"),
        # 1 is on both scales.
        ([0.0, 0.2, 0.5, 0.7, 1.0], r"most labels of valence are outside .* they go from 0 to 1"),
        ([-1.0, -0.5, 0.5, 1.0], r"most labels of valence are outside .* they go from -1 to 1"),
        ([3.0, 3.0], r"all 2 labels of valence are 3 \(corpus\.scale=\[1,5\]\)"),
    ],
)
def test_labels_of_which_no_ccc_can_say_anything_are_refused_by_name_range_and_scale(valence, words):
    rows = tuple(
        Utterance(f"u{number}", "", f"s{number % 5}", (1.0 + number % 2, label, 5.0 - number % 3))
        for number, label in enumerate(valence)
    )
    with pytest.raises(UserError, match=words):
        fold_splits(EmotionRecipe(system="mean"), Corpus("mine", (), (1.0, 5.0), rows))
