import json

import numpy as np

from cpcscale.emotion.scores.by_group import by_trait
from cpcscale.emotion.scores.system_table import SystemPredictions, TableSubject, system_table
from cpcscale.report.terminal.results import results_lines, results_markdown
from cpcscale.report.terminal.traits import trait_lines

TRUTH_UP = np.random.default_rng(0).uniform(1, 5, (80, 3))
VOICES = [f"voice{number % 8}" for number in range(80)]
GENDER = ["female" if voice < "voice4" else "male" for voice in VOICES]


def guesses(noise: float) -> np.ndarray:
    return TRUTH_UP + np.random.default_rng(1).normal(0, noise, TRUTH_UP.shape)


def table(gender: list[str] = GENDER):
    traits = {"gender": gender, "style": [""] * len(gender)}
    systems = {name: SystemPredictions((0,), guesses(noise)[None]) for name, noise in (("random", 2), ("precpc", 0.5))}
    subject = TableSubject("voices", "speakers5", (), 80, 8)
    made = system_table(subject, TRUTH_UP, VOICES, [0] * 80, systems, reference="random", traits=traits)
    return json.loads(json.dumps(made.as_dict())) | {"seconds": {"random": 1.0, "precpc": 1.0}}


def test_a_recogniser_is_said_by_gender_with_the_gap_and_its_interval():
    groups = by_trait(TRUTH_UP, guesses(0.5), VOICES, {"gender": ["", *GENDER[1:]], "style": [""] * 80})
    head, female, male, gap = trait_lines(groups)
    assert head == "  by gender (1 utterances without a gender are in no group)"
    assert female.startswith("    female, 39 utterances of 4 speakers: activation .")
    assert "[" not in female and male.startswith("    male, 40 utterances of 4 speakers: ")
    assert gap.startswith("    female minus male: activation ") and gap.count("[") == 4


def test_a_gap_without_an_interval_says_what_it_takes():
    alone = ["female" if voice == "voice0" else "male" for voice in VOICES]
    lines = list(trait_lines(by_trait(TRUTH_UP, guesses(0.5), VOICES, {"gender": alone})))
    assert lines[1].startswith("    female, 10 utterances of 1 speaker: ")
    assert lines[-1].endswith("(no interval: it needs 6 speakers in all and 2 in each group)") and "[" not in lines[-1]


def test_a_reproductions_page_has_a_table_by_gender_and_the_slopes_and_none_of_what_is_not_known():
    page = results_markdown(table())
    rows = [line for line in page.split("## By gender")[1].split("\n\n")[1].splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row.strip("|").split("|")][:4] for row in rows] == [
        ["system", "gender", "utterances", "speakers"],
        *(
            cells
            for system in ("random", "precpc")
            for cells in (
                [system, "female", "40", "4"],
                [system, "male", "40", "4"],
                [system, "female minus male", "", ""],
            )
        ),
    ]
    assert "## By style" not in page
    slopes = page.split("## Calibration slope")[1].split("## ")[0]
    spread = float(next(line for line in slopes.splitlines() if line.startswith("| random")).split("|")[2])
    assert 0 < spread < 0.5  # noise of a deviation of 2 on labels of 1.15
    unknown = table(["", "", *GENDER[2:]])
    assert "2 utterances without a gender are in no group." in " ".join(" ".join(results_lines(unknown)).split())
