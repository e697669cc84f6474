import csv
import json
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_voices import put_checkpoint, put_corpus, recipe
from sweeps import SPACE, family, settings

from cpcscale import config as configs
from cpcscale.cluster import session
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.finetune import FinetuneConfig
from cpcscale.experiments.sweep import features
from cpcscale.experiments.sweep.config import SweepConfig
from cpcscale.experiments.sweep.features import feature_key, feature_variants
from cpcscale.experiments.sweep.resources import TrialResources, plan_resources
from cpcscale.experiments.sweep.run import sweep
from cpcscale.experiments.sweep.space import parse_space, with_values
from cpcscale.experiments.sweep.trial import train_folds_by_epoch
from cpcscale.signals import handlers_restored

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    """One Ray for all of the module's sweeps."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        session.connect()
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    put_corpus(folder / "tones")
    config = settings(folder)
    busy = threading.Lock()

    def handler(number, frame):
        """Of the program that sweeps; like many, it holds what cannot be pickled."""
        busy.acquire()

    with handlers_restored(signal.SIGTERM, meanwhile=handler):
        result = sweep(config)
        assert signal.getsignal(signal.SIGTERM) is handler
    return config, result


def test_a_sweep_gives_its_best_by_inner_ccc_and_no_test_score(finished):
    config, result = finished
    assert result["trials"] == 3 and len(result["results"]) == 3
    assert result["inner_ccc"] == max(row["inner_ccc"] for row in result["results"])
    assert set(result["best"]) == set(SPACE) and result["best"]["fit.batch"] in (4, 6)
    assert len({row["values"]["fit.learning_rate"] for row in result["results"]}) == 3
    assert not any(key.startswith("ccc") for key in result)
    assert json.loads(Path(config.run_dir, "result.json").read_text()) == result
    left = {path.name for path in Path(config.run_dir).iterdir()}
    assert left == {"best.yaml", "ledger", "result.json", "run.json", "trials.csv"}


def test_trials_are_child_runs_of_one_sweep(finished):
    config, result = finished
    parent, children, folds = family(config)
    assert parent.run_id == result["run_id"] and parent.metrics["inner_ccc"] == pytest.approx(result["inner_ccc"])
    assert [child.name for child in children] == ["trial-0000", "trial-0001", "trial-0002"]
    assert {run.status for run in (parent, *children, *folds)} == {"FINISHED"}
    assert all(set(child.params) == set(SPACE) and child.history("inner_ccc") for child in children)
    assert not any(key.startswith("ccc") for run in (parent, *children, *folds) for key in run.metrics)


def test_the_folds_of_the_best_are_child_runs_of_it(finished):
    config, result = finished
    _, children, folds = family(config)
    best = children[result["best_trial"]]
    assert [fold.name for fold in folds] == ["fold-0", "fold-1", "fold-2"]
    assert {fold.parent for fold in folds} == {best.run_id}
    assert np.mean([fold.metrics["best_dev_ccc"] for fold in folds]) == pytest.approx(result["inner_ccc"])
    for fold in folds:
        curve = fold.history("dev_ccc")
        assert [step for step, _ in curve] == [1, 2]
        assert max(value for _, value in curve) == fold.metrics["best_dev_ccc"]


def test_the_table_has_every_trial(finished):
    config, result = finished
    text = Path(config.run_dir, "trials.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [int(row["trial"]) for row in rows] == [0, 1, 2]
    for row, reported in zip(rows, result["results"], strict=True):
        assert float(row["inner_ccc"]) == reported["inner_ccc"] and row["status"] == reported["status"]
        assert float(row["fit.learning_rate"]) == reported["values"]["fit.learning_rate"]
        assert (int(row["epochs"]), row["error"]) == (reported["epochs"], "")
    parent, *_ = family(config)
    assert parent.artifact("trials.csv").decode() == text


def test_the_best_is_a_config_that_fine_tunes_to_the_same_development_score(finished):
    config, result = finished
    best = configs.load(FinetuneConfig, str(Path(config.run_dir, "best.yaml")))
    assert best.fit.learning_rate == result["best"]["fit.learning_rate"] and best.system == "mfcc"
    prepared = prepare(best, open_corpus(best.corpus))
    folds = [run_fold(best, prepared, fold) for fold in range(3)]
    assert np.mean([fold.chosen["dev_ccc"] for fold in folds]) == pytest.approx(result["inner_ccc"], abs=1e-4)


def test_a_finished_sweep_is_given_back_and_another_config_is_refused(finished, monkeypatch):
    config, result = finished
    monkeypatch.setattr(session, "connect", lambda workers: pytest.fail("Ray was asked for"))
    assert sweep(config) == result
    with pytest.raises(UserError, match="holds a finished run with another config"):
        sweep(replace(config, trials=4))


def test_optuna_searches_quietly(tmp_path, capfd):
    put_corpus(tmp_path / "tones")
    result = sweep(settings(tmp_path, search="optuna", scheduler="none", trials=2))
    assert result["trials"] == 2 and all(row["epochs"] == 2 for row in result["results"])
    assert result["rungs"] == []
    assert capfd.readouterr().out == ""


def test_it_says_how_many_run_at_a_time_and_what_asha_sees(tmp_path, capfd):
    put_corpus(tmp_path / "tones")
    result = sweep(settings(tmp_path, epochs=3, reduction_factor=2, trials=2, workers=2))
    assert result["share"]["trials"] == 2 and result["rungs"] == [1, 2]
    said = capfd.readouterr().err
    assert "sweep: 2 trials, 2 at a time, each with " in said
    assert "3 folds of a trial train together, at most 3 epochs; asha compares inner_ccc after epoch 1, 2 and" in said


def test_checkpoints_are_searched_with_their_features_computed_once(tmp_path, monkeypatch):
    put_corpus(tmp_path / "tones")
    checkpoints = [put_checkpoint(tmp_path / name, seed) for name, seed in (("a", 7), ("b", 8))]
    space = {"encoder.checkpoint": {"choice": checkpoints}, "fit.learning_rate": {"uniform": [1e-3, 1e-2]}}
    heard = []
    monkeypatch.setattr(features, "prepare", lambda recipe, *rest: heard.append(recipe) or prepare(recipe, *rest))
    config = settings(tmp_path, system="precpc", trials=6, space=space, scheduler="none")
    result = sweep(config)
    assert [recipe.encoder.checkpoint for recipe in heard] == checkpoints
    tried = {row["values"]["encoder.checkpoint"] for row in result["results"]}
    assert tried == set(checkpoints) and not any("error" in row for row in result["results"])
    row = result["results"][0]
    recipe_of = with_values(config, row["values"])
    *_, last = train_folds_by_epoch(recipe_of, prepare(recipe_of, open_corpus(recipe_of.corpus)))
    assert last["inner_ccc"] == pytest.approx(row["inner_ccc"], abs=1e-4)
    for trial, tried in zip(family(config)[1], result["results"], strict=True):
        assert trial.tag("encoder").startswith(tried["values"]["encoder.checkpoint"])


def test_a_searched_encoder_may_be_frozen_or_not_and_each_trial_trains_what_it_drew(tmp_path):
    put_corpus(tmp_path / "tones", each=3)
    base = recipe(tmp_path / "tones", "precpc", put_checkpoint(tmp_path / "a"))
    space = {"encoder.frozen": {"choice": [True, False]}, "encoder.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    config = settings(tmp_path, system="precpc", encoder=base.encoder, seed=1, trials=4, space=space, scheduler="none")
    result = sweep(config)
    assert {row["values"]["encoder.frozen"] for row in result["results"]} == {True, False}
    assert not any("error" in row for row in result["results"])


def test_features_are_one_for_all_that_does_not_change_them(tmp_path):
    checkpoints = [put_checkpoint(tmp_path / name, seed) for name, seed in (("a", 7), ("b", 8))]
    base = recipe(tmp_path, "precpc", checkpoints[0])
    same = with_values(base, {"fit.batch": 9, "recogniser.dropout": 0.4, "encoder.learning_rate": 0.1})
    assert feature_key(same) == feature_key(base)
    for values in ({"encoder.checkpoint": checkpoints[1]}, {"encoder.frozen": False}, {"system": "random"}):
        assert feature_key(with_values(base, values)) != feature_key(base), values
    space = {"encoder.checkpoint": {"choice": checkpoints}, "system": {"choice": ["mfcc", "precpc"]}}
    # mfcc hears the same whatever the checkpoint.
    assert len(feature_variants(base, parse_space(space, base))) == 3


def test_a_checkpoint_that_is_not_there_is_refused_before_ray_starts(tmp_path, monkeypatch):
    put_corpus(tmp_path / "tones")
    space = {"encoder.checkpoint": {"choice": [put_checkpoint(tmp_path / "a"), str(tmp_path / "none")]}}
    monkeypatch.setattr(session, "connect", lambda workers: pytest.fail("Ray was asked for"))
    with pytest.raises(UserError, match=r"no pretraining at encoder\.checkpoint=.*none"):
        sweep(settings(tmp_path, system="precpc", space=space))
    assert not (tmp_path / "run").exists()


def test_inner_ccc_is_the_mean_over_folds_of_the_best_development_score_so_far(tmp_path):
    settings = recipe(put_corpus(tmp_path / "tones"), "mfcc", epochs=5, learning_rate=0.03)
    prepared = prepare(settings, open_corpus(settings.corpus))
    folds = [run_fold(settings, prepared, fold) for fold in range(3)]
    for number, report in enumerate(train_folds_by_epoch(settings, prepared), 1):
        best = [max(epoch.dev_ccc for epoch in fold.curve[:number]) for fold in folds]
        assert report["inner_ccc"] == pytest.approx(np.mean(best)) and report["epoch"] == number
        assert [fold["dev_ccc"] for fold in report["folds"]] == [fold.curve[number - 1].dev_ccc for fold in folds]


def test_a_trial_never_hears_a_test_speaker(tmp_path):
    settings = recipe(put_corpus(tmp_path / "tones"), "mfcc")
    prepared = prepare(settings, open_corpus(settings.corpus))
    one_fold = replace(prepared.folds, splits=prepared.folds.splits[:1])  # one fold's test speaker trains the others
    prepared = replace(prepared, folds=one_fold)
    silent = list(prepared.inputs)
    for row in one_fold.splits[0].test_rows:
        silent[row] = tuple(np.zeros_like(window) for window in silent[row])
    assert list(train_folds_by_epoch(settings, replace(prepared, inputs=silent))) == list(
        train_folds_by_epoch(settings, prepared)
    )


def test_a_combination_that_cannot_be_trained_is_a_bad_trial_and_not_the_end(tmp_path):
    put_corpus(tmp_path / "tones")
    space = {"recogniser.hidden": {"choice": [15, 16]}}
    config = settings(tmp_path, space=space, trials=6)
    result = sweep(config)
    assert result["best"] == {"recogniser.hidden": 16}
    bad = [row for row in result["results"] if row["values"]["recogniser.hidden"] == 15]
    assert bad and all(row["status"] == "failed" and row["inner_ccc"] == -1 for row in bad)
    assert all("is not a multiple of" in row["error"] for row in bad)
    _, children, _ = family(config)
    assert [child.status == "FAILED" for child in children] == [row in bad for row in result["results"]]


def test_a_sweep_of_which_no_trial_can_be_trained_says_why_and_tries_again(tmp_path):
    put_corpus(tmp_path / "tones")
    config = settings(tmp_path, space={"recogniser.hidden": {"choice": [15]}}, trials=2)
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 trials could be trained. Trial 0: .*is not a multiple of"):
            sweep(config)
        parent, children, _ = family(config)
        assert parent.status == "FAILED" and [child.status for child in children] == ["FAILED"] * 2
    assert not Path(config.run_dir, "trials").exists()


def test_values_are_put_where_their_keys_say():
    before = EmotionRecipe()
    after = with_values(before, {"fit.batch": 8, "encoder.learning_rate": 1e-5})
    assert (after.fit.batch, after.encoder.learning_rate) == (8, 1e-5)
    assert replace(after, fit=before.fit, encoder=before.encoder) == before


def test_a_space_may_be_dotted_or_nested():
    dotted = parse_space({"fit.batch": {"choice": [8, 16]}, "fit.learning_rate": {"uniform": [0, 1]}}, EmotionRecipe())
    nested = parse_space({"fit": {"batch": {"choice": [8, 16]}, "learning_rate": {"uniform": [0, 1]}}}, EmotionRecipe())
    assert dotted == nested


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty"),
        ({"fit.learning_rat": {"uniform": [0, 1]}}, r"did you mean fit\.learning_rate"),
        ({"run_dir": {"choice": ["a", "b"]}}, "run_dir is not a key of the recipe"),
        ({"corpus.path": {"choice": ["a", "b"]}}, r"corpus\.path cannot be searched: trials on other data"),
        ({"protocol.split": {"choice": ["loso", "official"]}}, r"protocol\.split cannot be searched: trials on other"),
        ({"head": {"choice": ["svr", "attention"]}}, "head cannot be searched: only the attention head"),
        ({"svm.c": {"loguniform": [0.1, 10]}}, r"svm\.c cannot be searched: its settings are chosen on inner folds"),
        ({"seed": {"randint": [0, 9]}}, "seed cannot be searched: the luckiest seed"),
        ({"fit.epochs": {"choice": [1, 2]}}, r"fit\.epochs cannot be searched: each trial chooses"),
        ({"pretraining.train.steps": {"choice": [1, 2]}}, r"pretraining\.train\.steps cannot be searched"),
        ({"pretraining.model.context.width": {"randint": [8, 16]}}, "changes the features, .* use choice, not randint"),
        ({"system": {"choice": ["mfcc", "minicpc"]}}, "system=minicpc cannot be swept: each trial"),
        ({"fit.learning_rate": {"normal": [0, 1]}}, "forms: uniform"),
        ({"fit.learning_rate": 0.1}, "forms: uniform"),
        ({"fit.learning_rate": {"uniform": [0, 1], "choice": [1]}}, "forms: uniform"),
        ({"fit.learning_rate": {"uniform": [1, 0]}}, "low below high"),
        ({"fit.learning_rate": {"uniform": ["a", "b"]}}, "low below high"),
        ({"fit.learning_rate": {"loguniform": [0, 1]}}, "above 0"),
        ({"fit.learning_rate": {"quniform": [0, 1]}}, r"\[low, high, step\]"),
        ({"fit.learning_rate": {"quniform": [0, 1, 0.3]}}, "a step above 0 that divides 1 - 0"),
        ({"fit.batch": {"uniform": [8, 16]}}, "whole number: draw it by randint or choice"),
        ({"fit.batch": {"choice": [8, "many"]}}, "'many' is not of the type of"),
        ({"fit.batch": {"choice": 8}}, "takes a list"),
    ],
)
def test_a_bad_space_is_refused(space, message):
    with pytest.raises(UserError, match=message) as error:
        parse_space(space, EmotionRecipe())
    assert "\n" not in str(error.value)


def test_systems_without_a_sweep_and_bad_settings_are_refused(tmp_path):
    for changes, message in (
        ({"system": "minicpc"}, "minicpc cannot be swept: each trial would pretrain"),
        ({"system": "mean"}, "no settings"),
        ({"system": "functionals"}, "functionals cannot be swept: the settings of its support vector machine"),
        ({"head": "svr"}, "head=svr cannot be swept"),
        ({"scheduler": "ash"}, "did you mean asha"),
        ({"grace_epochs": 9}, "above fit.epochs=2"),
        ({"workers": -1}, "workers=-1 is below 0"),
        ({"max_failures": -2}, "max_failures=-2 is below -1"),
        ({"run_dir": ""}, "run_dir is empty"),
    ):
        with pytest.raises(UserError, match=message):
            settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("workers", "device", "cpus", "gpus", "expected"),
    [
        (0, "auto", [2], [0], TrialResources(2, 1, 0)),
        (0, "auto", [64], [0], TrialResources(16, 4, 0)),  # 16 trials in all
        (1, "auto", [2], [0], TrialResources(1, 2, 0)),
        (3, "auto", [4], [0], TrialResources(3, 1, 0)),
        (4, "auto", [2], [0], TrialResources(4, 0.5, 0)),
        (1, "auto", [2, 8], [0, 0], TrialResources(1, 8, 0)),  # a trial has no more than a node
        (0, "auto", [16], [1], TrialResources(1, 16, 1)),
        (0, "cuda", [16, 16], [4, 4], TrialResources(8, 4, 1)),
        (0, "cpu", [8], [4], TrialResources(8, 1, 0)),
        (6, "auto", [16], [2], TrialResources(6, 2, 0.333)),
        (3, "auto", [16], [2], TrialResources(3, 5, 0.5)),
    ],
)
def test_trials_at_a_time_follow_from_what_the_cluster_has(workers, device, cpus, gpus, expected):
    assert plan_resources(workers, 16, device, cpus, gpus) == expected


@pytest.mark.parametrize(("given", "threads"), [("", 4), ("2", 2), ("8", 4), ("0", 4), ("4,2", 4)])
def test_a_trial_has_no_more_threads_than_the_user_set(monkeypatch, given, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert (TrialResources(1, 4, 0).threads, TrialResources(4, 0.5, 0).threads) == (threads, 1)


def test_what_a_trial_gets_is_said_in_words():
    assert plan_resources(0, 16, "auto", [2], [0]).described() == "2 at a time, each with 1 core"
    assert (
        plan_resources(8, 16, "auto", [2], [1]).described()
        == "8 at a time, each with 0.25 of a core and 0.125 of a GPU"
    )
    assert plan_resources(0, 1, "auto", [4], [1]).described() == "1 at a time, each with 4 cores and 1 GPU"


def test_absurd_numbers_of_trials_at_a_time_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"workers=200: so many trials at a time on 2 core\(s\) .* give at most 8"):
        plan_resources(200, 1000, "auto", [2], [0])
    with pytest.raises(UserError, match=r"workers=9: .* 1 GPU\(s\) .* give at most 8, or 0 for one trial a GPU"):
        plan_resources(9, 16, "auto", [16], [1])
    with pytest.raises(UserError, match=r"the cluster has no GPU: use fit\.device=auto or cpu"):
        plan_resources(0, 16, "cuda", [16], [0])
    assert plan_resources(200, 8, "auto", [2], [0]).trials == 8
    put_corpus(tmp_path / "tones")
    with pytest.raises(UserError, match="workers=5000: so many trials"):
        sweep(settings(tmp_path, workers=5000, trials=5000))
    assert not (tmp_path / "run").exists()


def test_the_quickstart_sweep_is_over_the_quickstart_fine_tuning():
    swept = configs.load(SweepConfig, str(CONFIGS / "sweep" / "quickstart.yaml"))
    tuned = configs.load(FinetuneConfig, str(CONFIGS / "finetune" / "quickstart.yaml"))
    for name in ("system", "seed", "corpus", "protocol", "encoder", "recogniser"):
        assert getattr(swept, name) == getattr(tuned, name)
    assert replace(swept.fit, epochs=tuned.fit.epochs) == tuned.fit
    assert parse_space(swept.space, swept)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda path: path.name)
def test_every_sweep_that_comes_with_the_project_is_one(path):
    config = configs.load(SweepConfig, str(path))
    dimensions = parse_space(config.space, config)
    text = path.read_text()
    assert config.system == "precpc" and config.encoder.frozen and text.startswith("# ")
    for rung in config.rungs:
        assert str(rung) in text.partition("\nsystem:")[0]
    assert {each.key for each in dimensions} <= set(configs.flat(config)) | set(config.space)
