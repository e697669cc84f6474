"""`cpcscale evaluate` with kind=encoders: several encoders, classic systems, several corpora, and tests over them."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_voices import put_checkpoint, put_corpus, recipe
from stores import store

from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.scores.paired import Pair, paired_test_over
from cpcscale.errors import UserError
from cpcscale.experiments.evaluate.config import EvaluateConfig
from cpcscale.experiments.evaluate.run import evaluate
from cpcscale.experiments.many_runs import read_predictions
from cpcscale.report.terminal.evaluate import evaluate_files
from cpcscale.tracking.store import TrackingConfig

BOTH = "functionals+prosody"


def settings(folder: Path, **changes: Any) -> EvaluateConfig:
    base = recipe(folder / "tones", "precpc")
    parts = {field.name: getattr(base, field.name) for field in fields(EmotionRecipe)}
    given = {
        "kind": "encoders",
        "run_dir": str(folder / "encoders"),
        "workers": 1,
        "systems": ["mean", "duration", "functionals", BOTH, "random", "precpc", f"precpc+{BOTH}"],
        "seeds": [0, 1],
        "head": "svr",
        "prosody": "pitch",
        "svm_search": False,
        "overrides": {"mean": {"head": "auto"}},
        "corpus": type(base.corpus)(),
        "corpora": {"small": {"path": str(folder / "tones")}, "large": {"path": str(folder / "others")}},
        "encoders": {
            "ours": [str(folder / f"seed{number}") for number in range(3)],
            "theirs": str(folder / "theirs"),
            "away": "hf:nowhere/at/all",
        },
        "encoder": replace(base.encoder, checkpoint=""),
        "tracking": TrackingConfig(uri=store(folder)),
    }
    return EvaluateConfig(**parts | given | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two corpora, three pretrainings of one encoder and one of another."""
    folder = tmp_path_factory.mktemp("encoders")
    put_corpus(folder / "tones", speakers=6, each=4)
    other = put_corpus(folder / "others", speakers=7, each=4) / "manifest.csv"
    head, *rows = other.read_text().splitlines()
    other.write_text("\n".join([f"{head},gender", *(f"{row},{'fm'[n % 2]}" for n, row in enumerate(rows))]) + "\n")
    for number in range(3):
        put_checkpoint(folder / f"seed{number}", seed=number)
    put_checkpoint(folder / "theirs", seed=9)
    return folder


@pytest.fixture(scope="module")
def config(folder) -> EvaluateConfig:
    return settings(folder)


@pytest.fixture(scope="module")
def table(config) -> dict[str, Any]:
    return evaluate(config)


def guesses(config: EvaluateConfig, *names: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(truth_UP, guess_SUP, speakers) of runs on one corpus."""
    said = [dict(read_predictions(Path(config.run_dir, name, "predictions.csv").read_text())) for name in names]
    keys, count = sorted(said[0]), 6 if names[0].startswith("small") else 7
    truth = np.stack([said[0][key].truth_P for key in keys])
    guess = np.stack([np.stack([each[key].guess_P[""] for key in keys]) for each in said])
    return truth, guess, [f"voice{int(key) % count}" for key in keys]


def test_every_encoder_is_scored_on_every_corpus_and_what_takes_none_once(table):
    rows = {(row["system"], row["encoder"], row["corpus"]): len(row["seeds"]) for row in table["rows"]}
    expected = {}
    for corpus in ("small", "large"):
        expected |= {(name, "", corpus): 1 for name in ("mean", "duration", "functionals", BOTH)}
        for encoder, pretrainings in (("ours", 3), ("theirs", 1)):
            # Untrained networks differ by seed, pretrained ones by their pretraining.
            expected |= {("random", encoder, corpus): 2, ("precpc", encoder, corpus): pretrainings}
            expected |= {(f"precpc+{BOTH}", encoder, corpus): pretrainings}
    assert rows == expected
    row = next(row for row in table["rows"] if row["at"] == "ours on large" and row["system"] == "precpc")
    assert row["activation_dominance"] == pytest.approx((row["ccc"]["activation"] + row["ccc"]["dominance"]) / 2)
    assert set(row["groups"]["gender"]["groups"]) == {"female", "male"}
    assert row["recall"] is None


def test_the_hypotheses_are_tested_over_corpora_with_swaps_within_each(table, config):
    ours, theirs = table["tests"]
    assert [(each["encoder"], each["family"], each["deciding"]) for each in (ours, theirs)] == [
        ("ours", "rated", "mean"),
        ("theirs", "rated", "mean"),
    ]
    assert [test["hypothesis"] for test in ours["tests"]] == ["H1", "H2", "H3", ""]
    pairs = []
    for corpus in ("small", "large"):
        truth, first, speakers = guesses(config, *(f"{corpus}-ours-{n}-precpc-seed0" for n in range(3)))
        pairs.append(Pair(truth, first, guesses(config, f"{corpus}-functionals-seed0")[1], speakers))
    expected = paired_test_over(pairs)
    for name, value in expected.difference.items():
        assert ours["tests"][0]["difference"][name] == pytest.approx(value, abs=1e-6)
        assert ours["tests"][0]["interval"][name] == pytest.approx(expected.interval[name], abs=1e-6)
    assert ours["tests"][0]["p"] == expected.p
    assert ours["tests"][3]["p_holm"] is None, "the control is none of the three hypotheses"
    # Three pretrainings against two untrained networks: the difference of the means.
    by_row = {(row["system"], row["at"]): row["ccc"]["mean"] for row in table["rows"]}
    at = ("ours on small", "ours on large")
    control = np.mean([by_row["precpc", where] - by_row["random", where] for where in at])
    assert ours["tests"][3]["difference"]["mean"] == pytest.approx(control)


@pytest.mark.parametrize(
    ("truth", "verdict"), [((1, 1, 1), "better"), ((1, 0, 1), "an addition"), ((0, 0, 0), "neither")]
)
def test_the_verdict_follows_from_the_three_hypotheses(truth, verdict):
    from cpcscale.experiments.evaluate.encoders import HYPOTHESES, judged

    rng = np.random.default_rng(0)
    label_UP = rng.normal(size=(200, 3))
    speakers = [f"v{n % 20}" for n in range(200)]
    tests = {}
    for asked, holds in zip(HYPOTHESES, truth, strict=True):
        good, poor = (label_UP + scale * rng.normal(size=label_UP.shape) for scale in (0.5, 1.5))
        tests[asked] = paired_test_over([Pair(label_UP, good if holds else poor, poor, speakers)])
    found = judged(tests, "rated")
    assert found["verdict"] == verdict
    del tests[HYPOTHESES[1]]
    assert judged(tests, "rated")["verdict"] is None


def test_weights_that_are_not_here_are_told_and_the_rest_is_run(table):
    assert list(table["not_run"]) == ["away"]
    assert "hf:nowhere/at/all" in table["not_run"]["away"]
    assert set(table["encoders"]) == {"ours", "theirs"}
    ours = table["encoders"]["ours"]
    assert (len(ours["urls"]), ours["updates"]) == (3, [1, 1, 1])
    assert ours["parameters"] > 0


def test_the_page_has_each_corpus_each_test_and_what_was_not_run(table):
    page = evaluate_files(table)["results.md"].decode()
    for words in ("## small", "## large", "large, by gender", "H1", "precpc - functionals", "not run", "A + D"):
        assert words in page, words
    for row in table["rows"]:
        assert f"{row['activation_dominance']:.3f}".replace("0.", ".", 1) in page


def test_the_same_command_gives_the_finished_one_back(table, config):
    assert evaluate(config) == table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoders": {}}, "takes an encoder or more"),
        ({"encoders": {"a": []}}, r"encoders\.a=\[\] names no checkpoint"),
        ({"encoders": {"a": ["x", "x"]}}, "or one twice"),
        ({"encoders": {"a": 3}}, "names no checkpoint"),
        ({"encoders": {"a/b": "x"}}, "cannot name a folder"),
        ({"corpora": {}}, "takes one corpus or more"),
        ({"kind": "learning", "corpora": {}}, "encoders is only for kind=encoders"),
    ],
)
def test_what_makes_no_comparison_is_refused_with_the_way_out(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        settings(tmp_path, **changes)


def test_an_encoder_that_is_not_there_is_refused(folder):
    with pytest.raises(UserError, match=r"no pretraining at encoder\.checkpoint=.*nowhere"):
        evaluate(settings(folder, encoders={"ours": str(folder / "nowhere")}, run_dir=str(folder / "none")))
    assert not (folder / "none").exists()
