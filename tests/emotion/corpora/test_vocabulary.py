import pytest
from made_corpora import IEMOCAP_CODES

from cpcscale.emotion.corpora import vocabulary


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("Train", "train"),
        ("Validation", "dev"),
        ("Development", "dev"),
        ("dev", "dev"),
        ("Test", "test1"),
        ("Test1", "test1"),
        (" test_2 ", "test2"),
        ("Test3", "test3"),
        ("NA", ""),
        ("N/A", ""),
        ("", ""),
        ("fold1", None),
    ],
)
def test_partitions_have_one_spelling(word, part):
    assert vocabulary.partition(word) == part


def test_one_spelling_stays_itself():
    for part in vocabulary.PARTITIONS:
        assert vocabulary.partition(part) == part
    for name in set(vocabulary.MSP_CATEGORIES.values()) | {vocabulary.category(code) for code in IEMOCAP_CODES}:
        assert vocabulary.category(name) == name


def test_emotions_that_several_corpora_have_meet_in_one_word():
    for words in (("Angry", "ang", "ANG", "anger"), ("Happy", "hap", "happiness", "joy"), ("fearful", "fea", "Fear")):
        assert len({vocabulary.category(word) for word in words}) == 1
    assert vocabulary.category("xxx") == vocabulary.MSP_CATEGORIES["X"] == vocabulary.NO_AGREEMENT


def test_genders_have_one_spelling_and_unknown_is_none():
    assert [vocabulary.gender(word) for word in ("M", "Female", "Unknown", "", "NULL", "Nonbinary")] == [
        *("male", "female", "", "", "", "nonbinary")
    ]
