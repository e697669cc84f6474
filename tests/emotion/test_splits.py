import random
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.emotion.splits import Split, dev_speakers, refuse_shared, speaker_folds, splits
from cpcscale.errors import UserError


def row_lists(fewest_speakers: int, counts: st.SearchStrategy[int]) -> st.SearchStrategy[list[str]]:
    voices = st.dictionaries(st.text(min_size=1, max_size=4), counts, min_size=fewest_speakers, max_size=20)
    return voices.map(lambda voices: [speaker for speaker, count in voices.items() for _ in range(count)])


any_rows = row_lists(4, st.integers(1, 30))
usable_rows = row_lists(7, st.integers(10, 19))  # no voice so large that too few speakers are left beside it
seeds = st.integers(0, 10_000)


@given(any_rows, st.integers(2, 4), seeds)
def test_every_speaker_is_tested_in_exactly_one_fold(speakers, folds, seed):
    parts = speaker_folds(speakers, folds, seed)
    assert sorted(chain(*parts)) == sorted(set(speakers))
    assert len(parts) == folds and all(parts)


@given(any_rows, st.integers(2, 4), seeds)
def test_folds_differ_by_at_most_the_largest_speaker(speakers, folds, seed):
    counts = Counter(speakers)
    load = [sum(counts[speaker] for speaker in part) for part in speaker_folds(speakers, folds, seed)]
    assert max(load) - min(load) <= max(counts.values())


@given(usable_rows, st.integers(2, 4), seeds, st.randoms())
def test_the_order_of_the_rows_does_not_matter(speakers, folds, seed, shuffler):
    mixed = speakers.copy()
    shuffler.shuffle(mixed)
    assert splits(speakers, folds, 0.25, seed) == splits(mixed, folds, 0.25, seed)


@given(usable_rows, st.integers(2, 4), st.floats(0, 1), seeds)
def test_the_parts_of_a_split_share_no_speaker_and_lose_no_row(speakers, folds, share, seed):
    for split in splits(speakers, folds, share, seed):
        parts = split.rows(speakers)
        assert sorted(chain(*parts)) == list(range(len(speakers)))
        voices = [{speakers[row] for row in part} for part in parts]
        assert all(voices) and not (voices[0] & voices[1] or voices[0] & voices[2] or voices[1] & voices[2])


def test_the_seed_decides_the_folds():
    speakers = [f"s{number}" for number in range(12)]
    assert len({str(speaker_folds(speakers, 3, seed)) for seed in range(5)}) == 5
    assert {len(part) for part in speaker_folds(speakers, 3, 0)} == {4}


def test_a_speaker_on_both_sides_is_refused():
    with pytest.raises(UserError, match="'b' is in the training and in the test part"):
        Split(0, train=("a", "b"), dev=("c",), test=("b",))
    with pytest.raises(UserError, match="development part of a split has no speaker"):
        Split(0, train=("a",), dev=(), test=("b",))
    refuse_shared({"training": ["a", "a"], "test": ["b"]})


def test_fewer_speakers_than_folds_or_nobody_to_choose_by_is_refused():
    with pytest.raises(UserError, match=r"2 speakers cannot fill protocol\.folds=3"):
        speaker_folds(["a", "b", "b"], 3, 0)
    with pytest.raises(UserError, match="at least 2"):
        speaker_folds(["a", "b"], 1, 0)
    with pytest.raises(UserError, match="needs one to train on"):
        splits(["a", "b"], 2, 0.25, 0)


def test_development_speakers_are_the_nearest_share_but_never_none_and_never_all():
    speakers = [str(number) for number in range(8)]
    assert [len(dev_speakers(speakers, share, 0, 0)) for share in (0.0, 0.25, 0.4, 1.0)] == [1, 2, 3, 7]
    assert dev_speakers(random.sample(speakers, 8), 0.25, 0, 0) == dev_speakers(speakers, 0.25, 0, 0)
