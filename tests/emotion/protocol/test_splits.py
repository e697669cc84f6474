import random
from collections import Counter
from dataclasses import replace
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_corpora import speaker_splits

from cpcscale.emotion.protocol.splits import (
    Split,
    SplitRow,
    dev_speakers,
    inner_splits,
    make_folds,
    parse_protocol,
    refuse_shared,
    speaker_folds,
    speaker_groups,
)
from cpcscale.errors import UserError

names = st.text(min_size=1, max_size=4)
seeds = st.integers(0, 10_000)
shares = st.floats(0.01, 0.99)
DISJOINT = ("speakers2", "speakers3", "loso")


@st.composite
def corpora(draw, *, sessions: bool = False) -> list[SplitRow]:
    """Rows of at least seven voices of like size, unknown ones with and without a recording among them."""
    speakers = draw(st.lists(names, min_size=7, max_size=12, unique=True))
    rows = []
    for number, speaker in enumerate(speakers):
        session = f"Session{number % 3}" if sessions else ""
        rows += [(speaker, session, draw(st.sampled_from(["", "r1", "r2"]))) for _ in range(draw(st.integers(3, 5)))]
    # Unknown speakers of a recording are in one session.
    recordings = draw(st.lists(st.sampled_from(["", "r1", "r2", "r3"]), max_size=8))
    rows += [("", f"Session{len(each)}" if sessions else "", each) for each in recordings]
    return [
        SplitRow(key=f"u{number}", speaker=speaker, session=session, recording=recording)
        for number, (speaker, session, recording) in enumerate(rows)
    ]


@st.composite
def owned(draw) -> list[SplitRow]:
    """Rows with the owner's parts: each named speaker in one, unknown ones anywhere."""
    parts = ["train", "dev", "test1", "test2"]
    rows = [(f"{part}-{voice}", part) for part in parts for voice in range(3) for _ in range(draw(st.integers(1, 3)))]
    rows += draw(st.lists(st.tuples(st.just(""), st.sampled_from(["", *parts])), max_size=8))
    return [SplitRow(key=f"u{number}", speaker=speaker, partition=part) for number, (speaker, part) in enumerate(rows)]


def voices(groups: tuple[str, ...], split: Split) -> list[set[str]]:
    return [{groups[row] for row in part} for part in split.rows()]


# Laws of every protocol.


@given(st.data(), st.sampled_from(["random2", "random3", *DISJOINT]), st.booleans(), shares, seeds)
def test_every_row_that_is_not_dropped_is_tested_exactly_once(data, protocol, sessions, share, seed):
    rows = data.draw(corpora(sessions=sessions))
    folds = make_folds(rows, protocol, dev_share=share, seed=seed)
    tested = [row for split in folds.splits for row in split.test_rows]
    assert sorted([*tested, *folds.dropped]) == list(range(len(rows)))
    lost = [row for row, each in enumerate(rows) if not each.speaker and not each.recording]
    assert list(folds.dropped) == ([] if protocol.startswith("random") else lost)
    assert folds.unknown == sum(not each.speaker for each in rows)


@given(st.data(), st.sampled_from(["random2", "random3", *DISJOINT]), st.booleans(), shares, seeds)
def test_the_parts_of_a_split_share_no_row_and_lose_none(data, protocol, sessions, share, seed):
    rows = data.draw(corpora(sessions=sessions))
    folds = make_folds(rows, protocol, dev_share=share, seed=seed)
    for split in folds.splits:
        assert sorted([*chain(*split.rows()), *folds.dropped]) == list(range(len(rows)))
        assert all(split.rows()) and all(list(part) == sorted(part) for part in split.rows())


@given(st.data(), st.sampled_from(DISJOINT), st.booleans(), shares, seeds)
def test_the_parts_of_a_split_share_no_speaker_and_no_recording_of_unknown_speakers(
    data, protocol, sessions, share, seed
):
    rows = data.draw(corpora(sessions=sessions))
    folds = make_folds(rows, protocol, dev_share=share, seed=seed)
    assert folds.marks == ()
    for split in folds.splits:
        found = voices(folds.groups, split)
        assert all(not one & other for one, other in combinations(found, 2))
        assert [set(split.train), set(split.dev), set(split.test)] == found and "" not in set().union(*found)


@given(st.data(), st.sampled_from(["random3", *DISJOINT, "official"]), shares, seeds, st.randoms())
def test_the_order_of_the_rows_does_not_matter(data, protocol, share, seed, shuffler):
    rows = data.draw(owned() if protocol == "official" else corpora(sessions=data.draw(st.booleans())))
    mixed = rows.copy()
    shuffler.shuffle(mixed)

    def said(rows: list[SplitRow]) -> list[object]:
        folds = make_folds(rows, protocol, dev_share=share, seed=seed)
        keys = [[{rows[row].key for row in part} for part in split.rows()] for split in folds.splits]
        listed = [(split.fold, split.name, split.train, split.dev, split.test) for split in folds.splits]
        return [keys, listed, {rows[row].key for row in folds.dropped}, folds.unknown]

    assert said(rows) == said(mixed)


# Folds of speakers.


@given(st.lists(names, min_size=4, max_size=60).filter(lambda rows: len(set(rows)) >= 4), st.integers(2, 4), seeds)
def test_every_speaker_is_held_out_once_and_folds_differ_by_at_most_the_largest_speaker(speakers, folds, seed):
    parts = speaker_folds(speakers, folds, str(seed))
    assert sorted(chain(*parts)) == sorted(set(speakers))
    assert len(parts) == folds and all(parts)
    counts = Counter(speakers)
    load = [sum(counts[speaker] for speaker in part) for part in parts]
    assert max(load) - min(load) <= max(counts.values())


def test_the_seed_decides_the_folds():
    speakers = [f"s{number}" for number in range(12)]
    assert len({str(speaker_folds(speakers, 3, str(seed))) for seed in range(5)}) == 5
    assert {len(part) for part in speaker_folds(speakers, 3, "0")} == {4}


def test_splits_of_a_list_of_speakers_are_those_of_the_speakers_protocol():
    speakers = [f"s{number % 7}" for number in range(30)]
    rows = [SplitRow(key=str(number), speaker=speaker) for number, speaker in enumerate(speakers)]
    assert speaker_splits(speakers, 3, 0.25, 5) == list(make_folds(rows, "speakers3", dev_share=0.25, seed=5).splits)
    train, dev, test = speaker_splits(speakers, 3, 0.25, 5)[0].rows(speakers)
    assert sorted(train + dev + test) == list(range(30))


def test_the_group_of_an_unknown_speaker_is_its_recording_and_never_the_name_of_a_speaker():
    rows = [
        SplitRow(key="1", speaker="recording 7"),
        SplitRow(key="2", speaker="", recording="7"),
        SplitRow(key="3", speaker="", recording="7"),
        SplitRow(key="4", speaker="", recording=""),
        SplitRow(key="5", speaker="ann", recording="7"),
    ]
    groups = speaker_groups(rows)
    assert groups == ["recording 7", "unknown, recording 7", "unknown, recording 7", "", "ann"]
    assert speaker_groups(rows[1:]) == ["recording 7", "recording 7", "", "ann"]


def test_development_speakers_are_the_nearest_share_but_never_none_and_never_all():
    speakers = [str(number) for number in range(8)]
    assert [len(dev_speakers(speakers, share, 0, 0)) for share in (0.0, 0.25, 0.4, 1.0)] == [1, 2, 3, 7]
    assert dev_speakers(random.sample(speakers, 8), 0.25, 0, 0) == dev_speakers(speakers, 0.25, 0, 0)


# Random folds.


@given(corpora(), st.integers(2, 6), shares, seeds)
def test_random_folds_are_of_one_size_and_tagged_leaky(rows, count, share, seed):
    folds = make_folds(rows, f"random{count}", dev_share=share, seed=seed)
    assert folds.marks == ("LEAKY",) and len(folds.splits) == count and all(split.leaky for split in folds.splits)
    sizes = [len(split.test_rows) for split in folds.splits]
    assert max(sizes) - min(sizes) <= 1
    for split in folds.splits:
        rest = len(rows) - len(split.test_rows)
        assert abs(len(split.dev_rows) - share * rest) <= 0.5 or len(split.dev_rows) in (1, rest - 1)


def test_under_random_a_speaker_stands_on_both_sides():
    rows = [SplitRow(key=str(number), speaker=f"s{number % 4}") for number in range(80)]
    for split in make_folds(rows, "random5", dev_share=0.2, seed=0).splits:
        assert set(split.train) & set(split.test) and set(split.train) & set(split.dev)


def test_random_folds_want_unique_keys_and_enough_utterances():
    with pytest.raises(UserError, match="'a' is there twice"):
        make_folds([SplitRow(key="a", speaker="x")] * 9, "random2", dev_share=0.2, seed=0)
    with pytest.raises(UserError, match="2 utterances cannot fill protocol=random2"):
        make_folds([SplitRow(key=key, speaker="x") for key in "ab"], "random2", dev_share=0.2, seed=0)


# Leave one out.


def test_loso_leaves_out_each_session_and_without_sessions_each_speaker():
    rows = [
        SplitRow(key=f"{turn}{number}", speaker=f"{session}{sex}", session=session)
        for number, (session, sex, turn) in enumerate((s, x, t) for s in ("S1", "S2", "S3") for x in "FM" for t in "ab")
    ]
    folds = make_folds(rows, "loso", dev_share=0.25, seed=0).splits
    assert [split.name for split in folds] == ["S1", "S2", "S3"]
    assert [split.test for split in folds] == [("S1F", "S1M"), ("S2F", "S2M"), ("S3F", "S3M")]
    assert all(len(split.dev) == 1 and len(split.train) == 3 for split in folds)
    alone = make_folds([SplitRow(key=row.key, speaker=row.speaker) for row in rows], "loso", dev_share=0.25, seed=0)
    assert [split.test for split in alone.splits] == [(split.name,) for split in alone.splits]
    assert [split.name for split in alone.splits] == ["S1F", "S1M", "S2F", "S2M", "S3F", "S3M"]


def test_loso_refuses_a_missing_session_one_session_and_a_speaker_in_two():
    rows = [SplitRow(key=str(number), speaker=f"s{number}", session=f"S{number % 2}") for number in range(8)]

    def loso(*more: SplitRow) -> None:
        make_folds([*rows, *more], "loso", dev_share=0.2, seed=0)

    loso()
    with pytest.raises(UserError, match="1 of 9 utterances have no session, the first 'x'"):
        loso(SplitRow(key="x", speaker="new"))
    with pytest.raises(UserError, match="speaker 's0' is in the sessions 'S1' and 'S0'"):
        loso(SplitRow(key="x", speaker="s0", session="S1"))
    with pytest.raises(UserError, match="2 sessions or speakers, and this corpus has 1"):
        make_folds(rows[::2], "loso", dev_share=0.2, seed=0)


# The owner's partitions.


@given(owned(), shares, seeds)
def test_official_has_the_owners_own_rows_in_each_part_and_tests_all_test_parts_by_one_fit(rows, share, seed):
    folds = make_folds(rows, "official", dev_share=share, seed=seed)
    (split,) = folds.splits
    assert folds.marks == ()
    for part, found in zip(("train", "dev", "test"), split.rows(), strict=True):
        assert found == [row for row, each in enumerate(rows) if each.partition.startswith(part)]
    assert "" not in split.train + split.dev + split.test
    assert [rows[row].partition for row in folds.dropped] == [""] * len(folds.dropped)
    assert folds.unknown == sum(not row.speaker for row in rows)


def test_unknown_speakers_may_stand_in_every_official_part_but_a_named_one_in_one_alone():
    rows = [
        SplitRow(key=f"{part}{speaker}", speaker=speaker, partition=part, recording="r1")
        for part, speakers in (("train", ("", "a", "b")), ("dev", ("", "c")), ("test1", ("",)), ("test2", ("", "d")))
        for speaker in speakers
    ]
    folds = make_folds(rows, "official", dev_share=0.2, seed=0)
    assert (folds.unknown, folds.dropped, folds.splits[0].test) == (4, (), ("d",))
    assert set(folds.groups) == {"a", "b", "c", "d", "recording r1"}
    for part, where in (("test2", "training and in the test"), ("dev", "training and in the development")):
        with pytest.raises(UserError, match=f"speaker 'a' is in the {where} part"):
            make_folds([*rows, SplitRow(key="x", speaker="a", partition=part)], "official", dev_share=0.2, seed=0)


@given(owned(), shares, seeds)
def test_without_an_official_development_part_its_speakers_come_from_the_training_part(rows, share, seed):
    rows = [row for row in rows if row.partition != "dev"]
    folds = make_folds(rows, "official", dev_share=share, seed=seed)
    train, dev, _ = folds.splits[0].rows()
    assert {rows[row].partition for row in train + dev} == {"train"}
    assert {rows[row].speaker for row in train}.isdisjoint({rows[row].speaker for row in dev})
    named = [row for row, each in enumerate(rows) if each.partition == "train" and each.speaker]
    assert sorted(train + dev) == named  # an unknown voice could be on the other side too


def test_official_refuses_a_corpus_without_parts_and_an_unknown_part():
    rows = [SplitRow(key=str(number), speaker=f"s{number}") for number in range(6)]
    with pytest.raises(UserError, match="no train partition; use speakers5 or loso"):
        make_folds(rows, "official", dev_share=0.2, seed=0)
    with pytest.raises(UserError, match="no test partition"):
        make_folds([SplitRow(key="a", speaker="a", partition="train")], "official", dev_share=0.2, seed=0)
    with pytest.raises(UserError, match="'a' has the partition 'Validation'"):
        make_folds([SplitRow(key="a", speaker="a", partition="Validation")], "official", dev_share=0.2, seed=0)


# Nested search.


@given(st.data(), st.sampled_from(["random3", *DISJOINT, "official"]), st.integers(2, 3), seeds)
def test_inner_folds_are_speaker_disjoint_and_never_touch_a_test_row(data, protocol, count, seed):
    rows = data.draw(owned() if protocol == "official" else corpora())
    folds = make_folds(rows, protocol, dev_share=0.2, seed=seed)
    for split in folds.splits:
        known = sorted(row for row in split.train_rows + split.dev_rows if folds.groups[row])
        made = inner_splits(split, folds.groups, count, seed)
        assert sorted(chain(*(each.dev_rows for each in made))) == known
        for each in made:
            assert sorted(each.train_rows + each.dev_rows) == known and each.test_rows == ()
            train, dev, test = voices(folds.groups, each)
            assert not train & dev and not test
            assert not set(known) & set(split.test_rows)


def test_one_inner_fold_is_the_splits_own_development_part():
    speakers = [f"s{number % 7}" for number in range(30)]
    for split in speaker_splits(speakers, 3, 0.25, 0):
        (one,) = inner_splits(split, speakers, 1, 0)
        assert (one.train_rows, one.dev_rows, one.test_rows) == (split.train_rows, split.dev_rows, ())
        assert (one.train, one.dev, one.test) == (split.train, split.dev, ())


def test_inner_folds_are_keyed_by_the_seed_and_the_fold():
    speakers = [f"s{number % 20}" for number in range(60)]
    first = speaker_splits(speakers, 5, 0.25, 0)[0]
    second = replace(first, fold=1)
    assert (
        inner_splits(first, speakers, 3, 0)
        == inner_splits(first, speakers, 3, 0)
        != inner_splits(first, speakers, 3, 1)
    )
    assert inner_splits(first, speakers, 3, 0) != inner_splits(second, speakers, 3, 0)
    with pytest.raises(UserError, match="16 speakers cannot fill 17 folds"):
        inner_splits(first, speakers, 17, 0)


# What is refused.


def test_a_speaker_on_both_sides_is_refused():
    with pytest.raises(UserError, match="'b' is in the training and in the test part"):
        Split(0, ("a", "b"), ("c",), ("b",), (0, 1), (2,), (3,))
    Split(0, ("a", "b"), ("c",), ("b",), (0, 1), (2,), (3,), leaky=True)
    refuse_shared({"training": ["a", "a"], "test": ["b"]})


def test_a_part_to_learn_from_without_an_utterance_is_refused():
    with pytest.raises(UserError, match="development part of fold 3 has no utterance"):
        Split(3, ("a",), (), ("b",), (0,), (), (1,))
    with pytest.raises(UserError, match="training part of fold 3 has no utterance"):
        Split(3, (), ("a",), ("b",), (), (0,), (1,))


def test_fewer_speakers_than_folds_or_nobody_to_choose_by_is_refused():
    with pytest.raises(UserError, match="2 speakers cannot fill 3 folds"):
        speaker_folds(["a", "b", "b"], 3, "0")
    with pytest.raises(UserError, match="needs one to train on"):
        speaker_splits(["a", "b"], 2, 0.25, 0)


def test_a_protocol_is_told_by_its_name():
    assert [parse_protocol(name) for name in ("random5", "loso", "official", "speakers12")] == [
        ("random", 5),
        ("loso", 0),
        ("official", 0),
        ("speakers", 12),
    ]
    for name in ("speakers", "speakers1", "speakers05", "random-5", "loso5", "", "speakers\u0665"):
        with pytest.raises(UserError, match="choose speakers5, loso, official or random5"):
            parse_protocol(name)
