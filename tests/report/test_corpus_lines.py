"""`cpcscale corpus describe` as its user meets it: every figure of the JSON in lines that can be read, or one error."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_corpora import put_emodb, put_iemocap, put_msp_podcast
from made_voices import put_corpus

from cpcscale import cli
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig, Utterance
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.emotion.scores.describe import describe
from cpcscale.report.compare import short
from cpcscale.report.terminal.corpus import corpus_lines


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["corpus", "describe", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def section(text: str, title: str) -> dict[str, list[str]]:
    """The rows of a table by their names, and its head by its title; a table ends at an empty line."""
    block = next(part for part in text.split("\n\n") if part.startswith(f"  {title} "))
    return {line[:16].strip(): line[16:].split() for line in block.splitlines()}


def line(text: str, name: str) -> str:
    return next(row[17:] for row in text.splitlines() if row[2:16].strip() == name)


def drawn(text: str) -> list[tuple[int, int]]:
    """(count, length of the bar) of every cell of the histogram."""
    head, *rows = next(part for part in text.split("\n\n") if part.startswith("  histogram")).splitlines()
    cells = [row[17:].ljust(78)[26 * at : 26 * at + 26] for row in rows for at in range(len(PRIMITIVES))]
    assert head.split()[1:] == list(PRIMITIVES)
    return [(int(cell[:8].replace(",", "")), cell.count("#")) for cell in cells]


def corpus_of(labels: list[tuple[float, float, float]], speakers: int = 2) -> Corpus:
    rows = tuple(Utterance(str(at), "nowhere.wav", f"s{at % speakers}", each) for at, each in enumerate(labels))
    return Corpus("some", (), (1.0, 5.0), rows)


def test_the_json_is_what_describe_gives(tmp_path, capsys):
    put_iemocap(tmp_path / "IEMOCAP")
    [text] = said(capsys, tmp_path / "IEMOCAP", "--json").splitlines()
    folder = str(tmp_path / "IEMOCAP")
    assert json.loads(text) == describe(open_corpus(CorpusConfig(path=folder)), folder)


def test_the_tables_hold_the_figures_of_the_json(tmp_path, capsys):
    put_iemocap(tmp_path / "IEMOCAP")
    text = said(capsys, tmp_path / "IEMOCAP")
    values = describe(open_corpus(CorpusConfig(path=str(tmp_path / "IEMOCAP"))))
    labels, correlation = section(text, "labels"), section(text, "correlation")
    human = section(text, "human")
    for at, name in enumerate(PRIMITIVES):
        figures = values["labels"][name]
        shown = [figures[key] for key in ("mean", "deviation", "skewness", "excess_kurtosis", "least", "median")]
        assert [float(cell) for cell in labels[name]] == pytest.approx([*shown, figures["greatest"]], abs=6e-4)
        assert [float(cell) for cell in correlation[name]] == pytest.approx(values["correlation"][at], abs=6e-4)
        assert float(human["CCC"][at]) == pytest.approx(values["human"]["ccc"][name], abs=6e-4)
        assert [count for count, _ in drawn(text)[at::3]] == figures["histogram"]["counts"]
    assert human["pairs"] == ["48", "48", "48"]
    assert "at least 1 other)" in text and "2 raters, 2.0 an utterance, of 24 rated utterances" in text
    assert "mean of their ratings to 0.01: activation 100%, valence 100%, dominance 100%" in text


def test_who_speaks_in_which_part_and_what_was_left_out_are_said(tmp_path, capsys):
    put_msp_podcast(tmp_path, podcasts=5)
    (tmp_path / "Audios" / "MSP-PODCAST_0001_0000.wav").unlink()
    text = said(capsys, tmp_path, "corpus.on_bad=skip", "name=pods")
    assert text.startswith("pods: 14 utterances, 0.00 h, 5 speakers, labels on 1 to 7, digest ")
    assert line(text, "speakers") == "5: 0 (1), 1 (2), 2 (2), 3 (2), 4 (2); 5 utterances of unknown speakers"
    assert line(text, "partitions") == "dev (3), test1 (3), test2 (3), train (5)"
    assert line(text, "gender") == "female (5), male (4), not given (5)"
    assert line(text, "styles") == "not given"
    assert line(text, "left out") == "no audio file (1)"


def test_a_stand_in_corpus_says_so_first_and_has_no_ceiling(tmp_path, capsys):
    text = said(capsys, put_emodb(tmp_path))
    assert text.startswith("emodb-proxy [PROXY]: 4 utterances")
    assert line(text, "human") == "agreement not known: the corpus has no ratings of single raters"


def test_a_table_of_any_scale_is_described_and_its_labels_outside_are_counted(tmp_path, capsys):
    folder = put_corpus(tmp_path / "tones")
    values = describe(open_corpus(CorpusConfig(path=str(folder), scale=[1, 4])))
    text = said(capsys, folder, "kind=csv", "scale=[1,4]")
    assert values["out_of_scale"] > 0
    assert line(text, "outside").startswith(f"{values['out_of_scale']} utterances have a label outside 1 to 4, used as")
    above = values["labels"]["valence"]["above_scale"]
    assert f"valence 0 below and {above} above" in line(text, "outside")


def test_what_has_no_figure_is_a_dash_and_unreadable_audio_is_counted():
    text = "\n".join(corpus_lines(describe(corpus_of([(3.0, 3.0, 3.0)] * 4))))
    assert section(text, "correlation")["valence"] == ["-", "-", "-"]
    assert section(text, "labels")["valence"][2:4] == ["-", "-"]
    assert line(text, "durations") == "unknown: no audio header of 4 can be read"
    assert "nan" not in text.split() and "None" not in text


def test_many_speakers_are_summed_up_and_few_are_listed():
    many = "\n".join(corpus_lines(describe(corpus_of([(3.0, 2.0, 1.0)] * 31, speakers=15))))
    assert line(many, "speakers") == "15: 2 to 3 utterances each, median 2"
    few = "\n".join(corpus_lines(describe(corpus_of([(3.0, 2.0, 1.0)] * 3))))
    assert line(few, "speakers") == "2: s0 (2), s1 (1)"


label = st.floats(1, 5)


@given(st.lists(st.tuples(st.tuples(label, label, label), st.integers(1, 200)), min_size=2, max_size=6))
def test_bars_grow_with_their_counts_and_only_an_empty_bin_has_none(rows):
    labels = [labels for labels, times in rows for _ in range(times)]
    cells = sorted(drawn("\n".join(corpus_lines(describe(corpus_of(labels))))))
    assert sum(count for count, _ in cells) == 3 * len(labels)
    assert [bar for _, bar in cells] == sorted(bar for _, bar in cells)
    assert all((count > 0) == (bar > 0) for count, bar in cells)
    assert cells[-1][1] == 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no corpus at corpus.path=nowhere"),
        (["corpus.path=nowhere"], "no corpus at corpus.path=nowhere:"),
        ([__file__], "has no column path, speaker"),
        (["nowhere", "corpus.kind=iemocp"], "did you mean iemocap?"),
        (["nowhere", "knd=csv"], "unknown key knd (did you mean kind?)"),
        (["nowhere", "path=elsewhere"], "path=elsewhere and nowhere are both given"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(capsys, arguments, words):
    assert cli.main(["corpus", "describe", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1 and words in error


def test_missing_audio_is_refused_in_words_that_the_command_takes(tmp_path, capsys):
    folder = put_corpus(tmp_path / "tones")
    Path(folder, "03.wav").unlink()
    assert cli.main(["corpus", "describe", str(folder)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "03.wav" in error and "corpus.on_bad=skip" in error
    assert line(said(capsys, folder, "corpus.on_bad=skip"), "left out") == "no audio file (1)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["corpus"], "the following arguments are required: what, path"),
        (["corpus", "describe"], "the following arguments are required: path"),
        (["corpus", "paint", "here"], "'paint' is not one of describe"),
        (["corpse", "describe", "here"], "(did you mean corpus?)"),
        (["corpus", "describe", "here", "--kind", "csv"], "corpus does not take --kind"),
    ],
)
def test_a_mistyped_command_is_one_line_with_the_way_out(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("cpcscale: error: ") and words in line and "--help" in line


def test_an_interval_below_zero_shows_it_and_noise_does_not():
    assert [short(value, 2) for value in (-0.004, -1e-17, 0.0, -0.0, 0.004, -0.268)] == [
        *("-.00", ".00", ".00", ".00", ".00", "-.27")
    ]


def test_every_verb_lists_its_keys(capsys):
    for verb, key in (("corpus", "kind=auto"), ("pretrain", "train.steps=0"), ("bench", "TrainBenchConfig:")):
        with pytest.raises(SystemExit) as ended:
            cli.main([verb, "--keys"])
        assert not ended.value.code
        assert key in capsys.readouterr().out
