from cpcscale.report.terminal.finetune import finetune_lines

FIGURES = {"activation": 0.5, "valence": -0.0001, "dominance": 0.25, "mean": 0.25}
RESULT = {
    "system": "mfcc",
    "corpus": "tones",
    "marks": [],
    "protocol": "speakers5",
    "utterances": 1234,
    "speakers": 10,
    "unknown": 0,
    "ccc": FIGURES,
    "ccc_by_part": {},
    "interval": {name: [value - 0.1, value + 0.1] for name, value in FIGURES.items()},
    "agreement": {"slope": FIGURES},
    "groups": {},
    "recall": None,
    "dropped": {},
}
SLOPES = "  calibration slope activation 0.500, valence 0.000, dominance 0.250"


def test_a_result_is_said_with_its_protocol_its_size_and_its_intervals():
    assert list(finetune_lines(RESULT)) == [
        "mfcc on tones, protocol speakers5, pooled over the test folds",
        "  1,234 utterances of 10 speakers",
        "  CCC activation 0.500  [0.400, 0.600]",
        "  CCC valence    0.000  [-0.100, 0.100]",
        "  CCC dominance  0.250  [0.150, 0.350]",
        "  CCC mean       0.250  [0.150, 0.350]",
        SLOPES,
    ]


def test_a_result_says_which_features_it_has():
    assert next(iter(finetune_lines({**RESULT, "shown": "prosody (pitch)"}))).startswith("prosody (pitch) on tones")


def test_what_was_left_out_unknown_or_not_to_be_had_is_said():
    lines = list(
        finetune_lines(
            {
                **RESULT,
                "marks": ["PROXY", "LEAKY"],
                "unknown": 12,
                "interval": None,
                "recall": 0.61239,
                "dropped": {"no audio file": 3, "no label": 1000},
            }
        )
    )
    assert lines[0] == "mfcc on tones [PROXY, LEAKY], protocol speakers5, pooled over the test folds"
    assert lines[1].endswith(", 12 utterances of unknown speakers in the corpus")
    assert lines[-4:] == [
        "  no intervals: they need at least 6 speakers",
        SLOPES,
        "  unweighted average recall of the categories 0.612",
        "  left out: 3 no audio file, 1,000 no label",
    ]


def test_the_owners_first_test_part_is_the_figure_and_the_others_stand_beside_it():
    lines = list(finetune_lines({**RESULT, "ccc_by_part": {"test1": FIGURES, "test2": FIGURES}}))
    assert lines[0].endswith("the owner's test1")
    assert lines[-2] == "  test2: activation 0.500, valence 0.000, dominance 0.250, mean 0.250"
