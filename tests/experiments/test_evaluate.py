import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_voices import put_corpus, recipe
from stores import store

from cpcscale import config as configs
from cpcscale.cluster import session
from cpcscale.emotion.audio.degraded import CONDITIONS
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.scores.ccc_intervals import interval, scores
from cpcscale.errors import UserError
from cpcscale.experiments.evaluate import run as module
from cpcscale.experiments.evaluate.config import EvaluateConfig
from cpcscale.experiments.evaluate.run import evaluate
from cpcscale.experiments.finetune import FinetuneConfig, finetune
from cpcscale.experiments.many_runs import read_predictions
from cpcscale.report.terminal.evaluate import evaluate_files, evaluate_lines
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.store import TrackingConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "evaluate"


def settings(folder: Path, kind: str, **changes: Any) -> EvaluateConfig:
    base = recipe(folder / "tones", "precpc")
    parts = {field.name: getattr(base, field.name) for field in fields(EmotionRecipe)}
    given = {
        "kind": kind,
        "run_dir": str(folder / kind),
        "workers": 1,
        "systems": ["functionals", "mfcc"],
        "svm_search": False,
        "tracking": TrackingConfig(uri=store(folder)),
    }
    return EvaluateConfig(**parts | given | changes)


def crossed(folder: Path, **changes: Any) -> EvaluateConfig:
    corpora = {"small": {"path": str(folder / "tones")}, "large": {"path": str(folder / "others")}}
    return settings(
        folder, "cross", **{"corpus": CorpusConfig(), "corpora": corpora, "systems": ["functionals"]} | changes
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two corpora whose speakers have the same names, the second in other units."""
    folder = tmp_path_factory.mktemp("evaluate")
    put_corpus(folder / "tones")
    other = put_corpus(folder / "others", speakers=7, each=5) / "manifest.csv"
    head, *rows = other.read_text().splitlines()
    cells = [row.split(",") for row in rows]
    turned = [",".join([*row[:2], *(f"{float(value):.3f}" for value in row[2:])]) for row in cells]
    other.write_text("\n".join([head, *turned]) + "\n")
    return folder


@dataclass
class Stopped:
    config: EvaluateConfig
    table: dict[str, Any]
    before: list[str]
    after: list[str]

    def rows(self, system: str) -> dict[str, dict[str, Any]]:
        return {row["at"]: row for row in self.table["rows"] if row["system"] == system}

    def said(self, name: str):
        return dict(read_predictions(Path(self.config.run_dir, name, "predictions.csv").read_text()))


def stopped_once(config: EvaluateConfig, after: int) -> Stopped:
    """An evaluation that is stopped after some runs, and taken up again."""
    begun: list[str] = []

    def until(single, **more):
        if len(begun) == after:
            raise KeyboardInterrupt
        begun.append(single.name)
        return finetune(single, **more)

    rest: list[str] = []

    def noted(single, **more):
        rest.append(single.name)
        return finetune(single, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "finetune", until)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config)
        assert not Path(config.run_dir, "results.json").exists()
        patch.setattr(module, "finetune", noted)
        return Stopped(config, evaluate(config), begun, rest)


@pytest.fixture(scope="module")
def robustness(folder) -> Stopped:
    return stopped_once(settings(folder, "robustness", seeds=[0, 1], test_conditions=["gain+0", "noise0"]), 1)


@pytest.fixture(scope="module")
def learning(folder) -> Stopped:
    return stopped_once(settings(folder, "learning", systems=["functionals"], shares=[0.5, 1.0]), 1)


@pytest.fixture(scope="module")
def cross(folder) -> Stopped:
    return stopped_once(crossed(folder), 2)


@pytest.fixture
def no_ray(monkeypatch) -> None:
    def connect(workers: int = 1) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(session, "connect", connect)


def test_a_stopped_evaluation_goes_on_with_what_is_left_and_runs_nothing_twice(robustness, learning, cross):
    assert robustness.before == ["functionals-seed0"]
    assert robustness.after == ["mfcc-seed0", "mfcc-seed1"]
    assert (learning.before, learning.after) == (["share0.5-functionals-seed0"], ["share1-functionals-seed0"])
    names = [f"{name}-{part}functionals-seed0" for name in ("small", "large") for part in ("", "to-others-")]
    assert (cross.before, cross.after) == (names[:2], names[2:])


@pytest.mark.usefixtures("no_ray")
def test_a_finished_one_is_given_back_and_stands_in_the_folder_and_below_one_tracked_run(robustness, learning, cross):
    for one, children in ((robustness, 3), (learning, 2), (cross, 4)):
        assert evaluate(one.config) == one.table
        place = Path(one.config.run_dir)
        assert json.loads((place / "results.json").read_text()) == json.loads(json.dumps(one.table))
        assert (place / "results.md").read_bytes() == evaluate_files(one.table)["results.md"]
        assert (place / "curves.png").exists() == (one is not cross)
        runs = read_runs(one.config.tracking, children=True)
        (parent,) = [run for run in runs if run.run_id == one.table["run_id"]]
        assert (parent.kind, parent.status, parent.children) == ("evaluate", "FINISHED", children)
        assert parent.artifact("results.json") == (place / "results.json").read_bytes()
        assert sorted(parent.metrics.values()) == sorted(row["ccc"]["mean"] for row in one.table["rows"])
        assert all(name.startswith("ccc_mean_") for name in parent.metrics)


def test_a_row_of_degraded_audio_is_the_mean_over_seeds_with_its_change_from_clean(robustness):
    rows = robustness.rows("mfcc")
    assert list(rows) == ["clean", "gain+0", "noise0"]
    seeds = [robustness.said(f"mfcc-seed{seed}") for seed in (0, 1)]
    keys = sorted(seeds[0])
    truth = np.stack([seeds[0][key].truth_P for key in keys])
    for at, condition in (("clean", ""), ("noise0", "noise0")):
        guess = np.stack([np.stack([said[key].guess_P[condition] for key in keys]) for said in seeds])
        assert rows[at]["ccc"] == pytest.approx(scores(truth, guess))
    assert rows["noise0"]["change"]["mean"] == pytest.approx(
        rows["noise0"]["ccc"]["mean"] - rows["clean"]["ccc"]["mean"]
    )
    assert rows["gain+0"]["change"]["mean"] == pytest.approx(0, abs=1e-3)
    assert (rows["clean"]["seeds"], rows["clean"]["utterances"], rows["clean"]["speakers"]) == ([0, 1], 36, 6)
    assert robustness.rows("functionals")["clean"]["seeds"] == [0]


def test_a_learning_curve_is_tested_on_the_same_utterances_and_says_how_many_were_labelled(learning):
    rows = learning.rows("functionals")
    assert [(row["share"], row["labelled"], row["utterances"]) for row in rows.values()] == [
        (0.5, 12.0, 36),
        (1.0, 24.0, 36),
    ]
    assert rows["0.5"]["ccc"] != rows["1"]["ccc"]
    assert learning.table["marks"] == []
    half = json.loads(Path(learning.config.run_dir, "share0.5-functionals-seed0", "result.json").read_text())
    assert half["marks"] == ["LABELS-0.5"]


def test_the_diagonal_is_what_finetune_finds_on_the_corpus_alone(cross, folder, tmp_path):
    base = recipe(folder / "others", "functionals")
    values = {field.name: getattr(base, field.name) for field in fields(EmotionRecipe)}
    alone = finetune(
        FinetuneConfig(
            **values | {"svm_search": False}, run_dir=str(tmp_path / "run"), workers=1, tracking=cross.config.tracking
        )
    )
    row = cross.rows("functionals")["large to large"]
    assert row["ccc"] == pytest.approx(alone.ccc, abs=1e-5)
    assert row["interval"]["mean"] == pytest.approx(alone.interval["mean"], abs=1e-5)


def test_across_corpora_all_of_one_trains_and_all_of_the_other_is_tested(cross):
    rows = cross.rows("functionals")
    assert list(rows) == ["small to small", "small to large", "large to large", "large to small"]
    sizes = {at: (row["utterances"], row["speakers"]) for at, row in rows.items()}
    assert sizes["small to large"] == sizes["large to large"] == (35, 7)
    assert sizes["large to small"] == (36, 6)
    stored = json.loads(Path(cross.config.run_dir, "small-to-others-functionals-seed0", "result.json").read_text())
    (fold,) = stored["folds"]
    assert fold["train_utterances"] + fold["dev_utterances"] == 36
    assert {name.partition("/")[0] for name in fold["test_speakers"]} == {"large"}
    assert set(fold["dev_speakers"]) < {f"small/voice{number}" for number in range(6)}
    said = cross.said("small-to-others-functionals-seed0")
    keys = sorted(said)
    truth, guess = (
        np.stack([get(said[key]) for key in keys]) for get in (lambda s: s.truth_P, lambda s: s.guess_P[""])
    )
    assert np.abs(truth).max() <= 1  # on the unit scale
    assert rows["small to large"]["ccc"] == pytest.approx(scores(truth, guess))
    voices = [f"voice{int(key.partition('/')[2]) % 7}" for key in keys]
    assert rows["small to large"]["interval"]["mean"] == pytest.approx(interval(truth, guess, voices)["mean"])


@pytest.mark.parametrize("name", ["robustness", "learning", "cross"])
def test_the_page_has_every_row_and_says_how_to_read_it(name, request):
    one = request.getfixturevalue(name)
    text = "\n".join(evaluate_lines(one.table))
    page = evaluate_files(one.table)["results.md"].decode()
    for row in one.table["rows"]:
        figure = f"{row['ccc']['mean']:.3f}".replace("0.", ".")
        assert figure in text and figure in page
    words = {"robustness": "of the same utterances", "learning": "at least one each", "cross": "raters"}[name]
    assert words in " ".join(text.split()) and words in page
    assert "protocol speakers3" in text.splitlines()[0]
    if name != "cross":
        assert evaluate_files(one.table)["curves.png"].startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_ray")
def test_a_dry_run_lists_the_runs_and_writes_nothing(folder, tmp_path):
    where = {"run_dir": str(tmp_path / "curve"), "dry_run": True}
    config = settings(folder, "learning", systems=["mean", "mfcc"], seeds=[0, 1], **where)
    listed = evaluate(config)
    shares = ["share0.1", "share0.25", "share0.5", "share1"]
    assert [run["name"] for run in listed["runs"]] == [
        *(f"{share}-{system}-seed0" for system in ("mean", "mfcc") for share in shares),
        *(f"{share}-mfcc-seed1" for share in shares),
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_ray")
def test_another_config_in_the_same_place_and_the_same_corpus_twice_are_refused(learning, folder, tmp_path):
    with pytest.raises(UserError, match=r"holds a finished run with another config"):
        evaluate(replace(learning.config, svm=replace(learning.config.svm, C=9.0)))
    copy = put_corpus(tmp_path / "tones")
    corpora = {"one": {"path": str(folder / "tones")}, "two": {"path": str(copy)}}
    with pytest.raises(UserError, match=r"corpora\.two holds the same utterances as corpora\.one"):
        evaluate(crossed(folder, corpora=corpora, run_dir=str(tmp_path / "cross")))
    assert [path.name for path in tmp_path.iterdir()] == ["tones"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("robustnes", {}, "did you mean robustness"),
        ("learning", {"shares": []}, r"shares=\[\] is empty"),
        ("learning", {"shares": [0.5, 1.5]}, r"train_share=1\.5 is not a share"),
        ("learning", {"test_conditions": ["reverb"]}, "test_conditions is only for kind=robustness"),
        ("robustness", {"test_conditions": ["hall"]}, "condition 'hall' is unknown"),
        ("robustness", {"corpora": {"a": {}}}, "corpora is only for kind=cross"),
        ("robustness", {"overrides": {"mfcc": {"test_conditions": ["reverb"]}}}, "test_conditions has to be the same"),
        ("cross", {}, r"give corpora=.*not corpus\.path"),
    ],
)
def test_what_makes_no_evaluation_is_refused_with_the_way_out(tmp_path, kind, changes, message):
    with pytest.raises(UserError, match=message):
        settings(tmp_path, kind, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpora": {"a": {"path": "x"}}}, "takes two corpora or more"),
        ({"corpora": {"a": {"path": "x"}, "b": {"path": "./x/"}}}, "are both at"),
        ({"corpora": {"a": {"path": "x"}, "b/c": {"path": "y"}}}, "cannot name a folder"),
        ({"corpora": {"a": {"path": "x"}, "b": {"kind": "csv"}}}, r"corpora\.b=.*does not describe a corpus"),
        ({"corpora": {"a": {"path": "x"}, "b": {"path": "y", "max_s": 3}}}, "max_s and on_bad as corpus.max_s"),
        ({"corpora": {"a": {"path": "x"}, "b": {"path": "y", "shards": "z"}}}, "reads audio files"),
        ({"protocol": replace(recipe(Path("x"), "mfcc").protocol, split="random5")}, "speaker-disjoint"),
    ],
)
def test_corpora_that_make_no_matrix_are_refused_with_the_way_out(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        crossed(tmp_path, **changes)


def test_the_configs_that_come_along_are_whole():
    found = {name: configs.load(EvaluateConfig, str(CONFIGS / f"{name}.yaml")) for name in module_kinds()}
    assert found["robustness"].recipe("precpc").test_conditions == list(CONDITIONS)
    assert found["learning"].shares == [0.1, 0.25, 0.5, 1.0]
    assert list(found["cross"].corpus_configs()) == ["emodb", "ravdess"]


def module_kinds() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))
