import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from made_voices import put_corpus, recipe

from cpcscale import config as configs
from cpcscale.cluster import session, trials
from cpcscale.cluster import sweep as sweeping
from cpcscale.cluster.finetune import FinetuneConfig
from cpcscale.cluster.space import apply, parse
from cpcscale.cluster.sweep import SweepConfig, sweep
from cpcscale.cluster.trials import folds_in_step
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import fold_splits, run_fold
from cpcscale.emotion.features import prepare
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.tracker import TrackingConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SPACE = {"fit.learning_rate": {"loguniform": [1e-3, 1e-2]}, "fit.batch": {"choice": [4, 6]}}


def settings(folder: Path, **changes) -> SweepConfig:
    base = recipe(folder / "tones", "mfcc")
    parts = {field.name: getattr(base, field.name) for field in fields(EmotionRecipe)}
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    given = {"run_dir": str(folder / "run"), "trials": 3, "space": SPACE, "tracking": tracking}
    return SweepConfig(**parts | given | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    put_corpus(folder / "tones")
    config = settings(folder)
    return config, sweep(config)


def test_a_sweep_gives_its_best_by_inner_ccc_and_no_test_score(finished):
    config, result = finished
    assert result["trials"] == 3 and len(result["results"]) == 3
    assert result["inner_ccc"] == max(row["inner_ccc"] for row in result["results"])
    assert set(result["best"]) == set(SPACE) and result["best"]["fit.batch"] in (4, 6)
    assert len({row["values"]["fit.learning_rate"] for row in result["results"]}) == 3
    assert not any(key.startswith("ccc") for key in result)
    assert json.loads(Path(config.run_dir, "result.json").read_text()) == result
    assert sorted(path.name for path in Path(config.run_dir).iterdir()) == ["best.yaml", "result.json", "run.json"]


def test_trials_are_child_runs_of_one_sweep(finished):
    config, result = finished
    runs = read_runs(config.tracking, children=True)
    (parent,) = [run for run in runs if run.kind == "sweep"]
    children = [run for run in runs if run.kind == "trial"]
    assert parent.run_id == result["run_id"] and parent.metrics["inner_ccc"] == pytest.approx(result["inner_ccc"])
    assert len(children) == 3 and {child.parent for child in children} == {parent.run_id}
    assert {child.status for child in children} == {"FINISHED"}
    assert all(set(child.params) == set(SPACE) and child.history("inner_ccc") for child in children)
    assert not any(key.startswith("ccc") for run in runs for key in run.metrics)


def test_the_best_is_a_config_that_fine_tunes_to_the_same_development_score(finished):
    config, result = finished
    best = configs.load(FinetuneConfig, str(Path(config.run_dir, "best.yaml")))
    assert best.fit.learning_rate == result["best"]["fit.learning_rate"] and best.system == "mfcc"
    corpus = open_corpus(best.corpus)
    folds = [run_fold(best, corpus, fold) for fold in range(3)]
    assert np.mean([fold.dev_ccc for fold in folds]) == pytest.approx(result["inner_ccc"], abs=1e-4)


def test_a_finished_sweep_is_given_back_and_another_config_is_refused(finished, monkeypatch):
    config, result = finished
    monkeypatch.setattr(session, "connect", lambda workers: pytest.fail("Ray was asked for"))
    assert sweep(config) == result
    with pytest.raises(UserError, match="holds a finished run of another config"):
        sweep(replace(config, trials=4))


def test_optuna_searches_quietly(tmp_path, capfd):
    put_corpus(tmp_path / "tones")
    result = sweep(settings(tmp_path, search="optuna", scheduler="none", trials=2))
    assert result["trials"] == 2 and all(row["epochs"] == 2 for row in result["results"])
    assert capfd.readouterr().out == ""


def test_inner_ccc_is_the_mean_over_folds_of_the_best_development_score_so_far(tmp_path):
    settings = recipe(put_corpus(tmp_path / "tones"), "mfcc", epochs=5, learning_rate=0.03)
    corpus = open_corpus(settings.corpus)
    prepared = prepare(settings, corpus)
    folds = [run_fold(settings, corpus, fold, prepared) for fold in range(3)]
    for number, report in enumerate(folds_in_step(settings, corpus, prepared), 1):
        best = [max(epoch.dev_ccc for epoch in fold.curve[:number]) for fold in folds]
        assert report["inner_ccc"] == pytest.approx(np.mean(best)) and report["epoch"] == number


def test_a_trial_never_hears_a_test_speaker(tmp_path, monkeypatch):
    settings = recipe(put_corpus(tmp_path / "tones"), "mfcc")
    corpus = open_corpus(settings.corpus)
    prepared = prepare(settings, corpus)
    one_fold = fold_splits(settings, corpus)[:1]  # a speaker that one fold tests trains the others
    monkeypatch.setattr(trials, "fold_splits", lambda *_: one_fold)
    silent = list(prepared.inputs)
    for row in one_fold[0].rows(corpus.speakers)[2]:
        silent[row] = np.zeros_like(silent[row])
    assert list(folds_in_step(settings, corpus, replace(prepared, inputs=silent))) == list(
        folds_in_step(settings, corpus, prepared)
    )


def test_a_combination_that_cannot_be_trained_is_a_bad_trial_and_not_the_end(tmp_path, monkeypatch):
    from ray import tune

    settings = recipe(put_corpus(tmp_path / "tones"), "mfcc")
    corpus = open_corpus(settings.corpus)
    reports: list[dict] = []
    monkeypatch.setattr(tune, "report", reports.append)
    shared = (corpus, prepare(settings, corpus))
    trials.trial({"recogniser.hidden": 15}, settings, shared, 1)
    assert reports[0]["inner_ccc"] == -1 and "does not divide" in reports[0]["error"]
    rows = [{"values": {}, "inner_ccc": -1.0, "epochs": 0, "error": "why"}]
    with pytest.raises(UserError, match="none of the 1 trials could be trained; the first: why"):
        sweeping._summary(settings, corpus, rows)


def test_values_are_put_where_their_keys_say():
    before = EmotionRecipe()
    after = apply(before, {"fit.batch": 8, "encoder.learning_rate": 1e-5})
    assert (after.fit.batch, after.encoder.learning_rate) == (8, 1e-5)
    assert replace(after, fit=before.fit, encoder=before.encoder) == before


def test_a_space_may_be_dotted_or_nested():
    dotted = parse({"fit.batch": {"choice": [8, 16]}, "fit.learning_rate": {"uniform": [0, 1]}}, EmotionRecipe())
    nested = parse({"fit": {"batch": {"choice": [8, 16]}, "learning_rate": {"uniform": [0, 1]}}}, EmotionRecipe())
    assert dotted == nested


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty"),
        ({"fit.learning_rat": {"uniform": [0, 1]}}, r"did you mean fit\.learning_rate"),
        ({"corpus.path": {"choice": ["a", "b"]}}, r"corpus\.path cannot be searched"),
        ({"fit.epochs": {"choice": [1, 2]}}, r"fit\.epochs cannot be searched"),
        ({"fit.learning_rate": {"normal": [0, 1]}}, "not one of the forms uniform"),
        ({"fit.learning_rate": 0.1}, "not one of the forms"),
        ({"fit.learning_rate": {"uniform": [0, 1], "choice": [1]}}, "not one of the forms"),
        ({"fit.learning_rate": {"uniform": [1, 0]}}, "low below high"),
        ({"fit.learning_rate": {"uniform": ["a", "b"]}}, "low below high"),
        ({"fit.learning_rate": {"loguniform": [0, 1]}}, "above 0"),
        ({"fit.learning_rate": {"quniform": [0, 1]}}, r"\[low, high, step\]"),
        ({"fit.batch": {"uniform": [8, 16]}}, "whole number: draw it by randint or choice"),
        ({"fit.batch": {"choice": [8, "many"]}}, "'many' is not of the type of"),
        ({"fit.batch": {"choice": 8}}, "wants a list"),
    ],
)
def test_a_bad_space_is_refused(space, message):
    with pytest.raises(UserError, match=message) as error:
        parse(space, EmotionRecipe())
    assert "\n" not in str(error.value)


def test_systems_without_a_sweep_and_bad_settings_are_refused(tmp_path):
    for changes, message in (
        ({"system": "minicpc"}, "minicpc is not swept: every trial would pretrain"),
        ({"system": "mean"}, "nothing to set"),
        ({"scheduler": "ash"}, "did you mean asha"),
        ({"grace_epochs": 9}, "above fit.epochs=2"),
    ):
        with pytest.raises(UserError, match=message):
            settings(tmp_path, **changes)


def test_the_quickstart_sweep_is_over_the_quickstart_fine_tuning():
    swept = configs.load(SweepConfig, str(CONFIGS / "sweep" / "quickstart.yaml"))
    tuned = configs.load(FinetuneConfig, str(CONFIGS / "finetune" / "quickstart.yaml"))
    for name in ("system", "seed", "corpus", "protocol", "encoder", "recogniser"):
        assert getattr(swept, name) == getattr(tuned, name)
    assert replace(swept.fit, epochs=tuned.fit.epochs) == tuned.fit
    assert parse(swept.space, swept)
