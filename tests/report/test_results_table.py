import json

import numpy as np
import pytest

from cpcscale.emotion.scores.system_table import SystemPredictions, TableSubject, published_scores, system_table
from cpcscale.report.terminal.results import results_lines, results_markdown, run_lines

SPEAKERS = [f"voice{number % 7}" for number in range(42)]
TRUTH_UP = np.random.default_rng(0).uniform(1, 5, (42, 3))


def guesses(noise: float, seeds: tuple[int, ...], recalls: tuple[float, ...] = ()) -> SystemPredictions:
    rng = np.random.default_rng(int(100 * noise))
    return SystemPredictions(seeds, TRUTH_UP + rng.normal(0, noise, (len(seeds), *TRUTH_UP.shape)), recalls)


def table(kind: str = "csv", speakers: list[str] = SPEAKERS, marks: tuple[str, ...] = ("PROXY",), left_out: int = 0):
    subject = TableSubject("voices", "speakers5", marks, len(speakers), len(set(speakers)), left_out=left_out)
    systems = {
        "random": guesses(3, (0, 1)),
        "functionals": guesses(1, (0,)),
        "precpc": guesses(0.5, (0, 1), (0.5, 0.7)),
    }
    folds = [number % 7 % 3 for number in range(42)]
    made = system_table(
        subject, TRUTH_UP, speakers, folds, systems, reference="random", published=published_scores(kind)
    )
    seconds = {"random": 10.0, "functionals": 600.0, "precpc": 8000.0}
    return json.loads(json.dumps(made.as_dict())) | {"seconds": seconds}


def line_of(lines: list[str], system: str) -> str:
    return next(line for line in lines if line.split()[:1] == [system])


@pytest.mark.parametrize("render", [lambda made: "\n".join(results_lines(made)), results_markdown])
def test_every_table_says_its_corpus_marks_protocol_and_sizes(render):
    text = render(table(left_out=2))
    assert "voices [PROXY], protocol speakers5: 42 utterances of 7 speakers, 2 left out" in text
    assert "PROXY: labels are mapped from emotion categories, not rated." in " ".join(text.split())
    assert "[PROXY]" not in render(table(marks=()))


def test_the_terminal_and_the_page_show_the_same_cells():
    made = table("iemocap")
    rows = [line for line in results_markdown(made).splitlines() if line.startswith("| ")]
    shown = {tuple(line.split()) for line in results_lines(made)}
    for row in rows:
        assert tuple(row.replace("|", " ").split()) in shown


def test_a_row_says_which_features_a_system_of_several_has():
    made = table() | {"shown": {"functionals": "functionals (pitch)"}}
    assert any(line.split()[:2] == ["functionals", "(pitch)"] for line in results_lines(made))


def test_a_row_has_the_figure_its_interval_and_the_recall_over_seeds():
    made = table()
    line = line_of(results_lines(made), "precpc")
    row = made["rows"][-1]
    low, high = row["interval"]["valence"]
    assert f"{row['ccc']['valence']:.3f} [{low:.2f}, {high:.2f}]".replace("0.", ".") in line
    assert line.endswith(".600 +- .141")
    assert line_of(results_lines(made), "random").endswith(" -")


def test_few_speakers_have_no_interval_and_the_table_says_so():
    made = table(speakers=[f"voice{number % 3}" for number in range(42)])
    lines = results_lines(made)
    assert "[" not in line_of(lines, "precpc")
    assert "none below 6" in " ".join(lines)


def test_a_test_shows_the_difference_its_interval_p_after_holm_and_how_it_was_made():
    made = table()
    page = results_markdown(made)
    (test,) = [test for test in made["tests"]["random"] if test["first"] == "precpc"]
    p = [f"{test[name]['mean']:.3f}".replace("0.", ".") for name in ("p_holm", "p")]
    low, high = (f"{bound:.2f}".replace("0.", ".") for bound in test["interval"]["mean"])
    assert f"+{test['difference']['mean']:.3f} [{low}, {high}] p {p[0]} ({p[1]})".replace("+0.", "+.") in page
    assert (
        "over all 128 assignments of the predictions of 7 speakers to the two systems; the smallest possible p is 0.016"
        in page
    )
    assert "## Against functionals" in page and "has to beat" in page


def test_the_papers_figures_stand_beside_ours_on_its_corpora_and_nowhere_else():
    page = results_markdown(table("iemocap"))
    (row,) = [line for line in page.splitlines() if line.startswith("| precpc") and ".752" in line]
    assert [cell.strip() for cell in row.strip("|").split("|")][2::2] == [".752", ".752", ".691", ".731"]
    assert "| minicpc | - | - |" in page
    assert "by session or at random not stated" in page and "2102.06357" in page
    assert "Compared with the paper" not in results_markdown(table("emodb"))


def test_a_dry_run_says_which_runs_are_done_and_which_are_to_do():
    runs = [
        {"name": "mfcc-seed0", "system": "mfcc", "seed": 0, "seconds": 90.0, "done": True},
        {"name": "raw-seed0", "system": "raw", "seed": 0, "seconds": None, "done": False},
    ]
    lines = [" ".join(line.split()) for line in run_lines({"runs": runs, "done": 1})]
    assert lines == ["2 runs: 1 done, 1 to do", "mfcc-seed0 done in 2 min", "raw-seed0 to do"]
