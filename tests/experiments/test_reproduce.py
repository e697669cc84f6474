import csv
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_voices import TINY, put_checkpoint, put_corpus, recipe
from stores import store

from cpcscale import config as configs
from cpcscale.cluster import session
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.recipe import SYSTEMS, EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.finetune import finetune
from cpcscale.experiments.many_runs_config import depends_on_seed, with_seed
from cpcscale.experiments.reproduce import run as module
from cpcscale.experiments.reproduce.run import ReproduceConfig, reproduce
from cpcscale.report.terminal.results import results_markdown
from cpcscale.tracking.runs import TrackedRun, read_runs
from cpcscale.tracking.store import TrackingConfig
from cpcscale.train.recipe import Recipe, TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
EMODB = str(CONFIGS / "reproduce" / "emodb.yaml")
NAMES = ["mean-seed0", "random-seed0", "functionals-seed0", "mfcc-seed0", "random-seed1", "mfcc-seed1"]


def settings(folder: Path, **changes: Any) -> ReproduceConfig:
    base = recipe(folder / "tones", "precpc")
    parts = {field.name: getattr(base, field.name) for field in fields(EmotionRecipe)}
    given = {
        "run_dir": str(folder / "table"),
        "workers": 1,
        "systems": ["mean", "random", "functionals", "mfcc"],
        "seeds": [0, 1],
        "overrides": {"mfcc": {"fit.epochs": 3}},
        "tracking": TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    }
    return ReproduceConfig(**parts | given | changes)


@dataclass
class Stopped:
    """A reproduction that was stopped between two runs, as the store had it then, and taken up again."""

    config: ReproduceConfig
    table: dict[str, Any]
    before: list[str]
    after: list[str]
    parent_then: TrackedRun

    def result(self, name: str) -> dict[str, Any]:
        return json.loads(Path(self.config.run_dir, name, "result.json").read_text())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """One file of the corpus cannot be read, which `mean` does not notice."""
    folder = tmp_path_factory.mktemp("reproduce")
    put_corpus(folder / "tones")
    store(folder)
    (folder / "tones" / "07.wav").write_bytes(b"no audio")
    config = settings(folder, corpus=CorpusConfig(path=str(folder / "tones"), on_bad="skip"))
    before: list[str] = []
    after: list[str] = []

    def until_the_third(single, **more):
        if len(before) == 2:
            raise KeyboardInterrupt
        before.append(single.name)
        return finetune(single, **more)

    def noted(single, **more):
        after.append(single.name)
        return finetune(single, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "finetune", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            reproduce(config)
        (then,) = [run for run in read_runs(config.tracking) if not run.parent]
        patch.setattr(module, "finetune", noted)
        table = reproduce(config)
    return Stopped(config, table, before, after, then)


@pytest.fixture
def no_ray(monkeypatch) -> None:
    def connect(workers: int = 1) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(session, "connect", connect)


def test_a_stopped_reproduction_goes_on_with_what_is_left_and_runs_nothing_twice(stopped):
    assert stopped.before == NAMES[:2]
    assert stopped.after == NAMES[2:]


def test_the_tracker_shows_one_parent_with_every_run_below_it(stopped):
    runs = read_runs(stopped.config.tracking, children=True)
    (parent,) = [run for run in runs if not run.parent]
    assert (parent.kind, parent.status, parent.run_id) == ("reproduce", "FINISHED", stopped.table["run_id"])
    assert (stopped.parent_then.status, stopped.parent_then.run_id) == ("KILLED", parent.run_id)
    children = [run for run in runs if run.parent]
    assert {run.parent for run in children} == {parent.run_id}
    assert sorted(run.name for run in children) == sorted(NAMES)
    assert {(run.kind, run.status) for run in children} == {("finetune", "FINISHED")}
    assert {name: parent.tag(name) for name in ("systems", "corpus", "protocol")} == {
        "systems": "mean,random,functionals,mfcc",
        "corpus": "tones",
        "protocol": "speakers3",
    }
    assert parent.metrics["ccc_mean_functionals"] == stopped.table["rows"][2]["ccc"]["mean"]


def test_the_folder_and_the_parent_run_hold_the_table(stopped):
    text = Path(stopped.config.run_dir, "results.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(stopped.table))
    page = Path(stopped.config.run_dir, "results.md").read_text()
    assert page == results_markdown(json.loads(text))
    (parent,) = [run for run in read_runs(stopped.config.tracking) if not run.parent]
    assert parent.artifact("results.json") == text.encode()
    assert parent.artifact("results.md") == page.encode()


def test_a_row_is_the_mean_over_its_seeds_of_what_the_single_runs_found(stopped):
    rows = {row["system"]: row for row in stopped.table["rows"]}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "mean": [0],
        "random": [0, 1],
        "functionals": [0],
        "mfcc": [0, 1],
    }
    # All but mean, which has an utterance more.
    for system in ("random", "functionals", "mfcc"):
        singles = [stopped.result(f"{system}-seed{seed}") for seed in rows[system]["seeds"]]
        for key in ("ccc", "ccc_mean_of_folds"):
            for name, value in rows[system][key].items():
                assert value == pytest.approx(np.mean([single[key][name] for single in singles]), abs=1e-5)
    assert rows["functionals"]["interval"]["mean"] == pytest.approx(
        stopped.result("functionals-seed0")["interval"]["mean"], abs=1e-5
    )
    assert rows["functionals"]["ccc"]["mean"] > 0.3


def test_seeds_differ_and_overrides_reach_their_system_alone(stopped):
    assert stopped.result("mfcc-seed0")["ccc"] != stopped.result("mfcc-seed1")["ccc"]
    assert {row["epoch"] for row in stopped.result("mfcc-seed0")["curves"]} == {1, 2, 3}
    assert {row["epoch"] for row in stopped.result("random-seed0")["curves"]} == {1, 2}


def test_the_table_is_of_the_utterances_that_every_system_heard(stopped):
    subject = stopped.table["subject"]
    assert (subject["utterances"], subject["left_out"], subject["speakers"]) == (35, 1, 6)
    text = Path(stopped.config.run_dir, "mean-seed0", "predictions.csv").read_text().splitlines()
    assert len(list(csv.DictReader(text))) == 36
    assert "1 left out because not every system could read them" in results_markdown(stopped.table)


@pytest.mark.usefixtures("no_ray")
def test_a_finished_reproduction_is_given_back_without_a_run(stopped):
    assert reproduce(stopped.config) == stopped.table


@pytest.mark.usefixtures("no_ray")
def test_a_dry_run_lists_what_is_done_and_what_one_more_seed_adds_and_writes_nothing(stopped):
    place = Path(stopped.config.run_dir)
    files = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    listed = reproduce(replace(stopped.config, seeds=[0, 1, 2], dry_run=True))
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == files
    assert [run["name"] for run in listed["runs"] if not run["done"]] == ["random-seed2", "mfcc-seed2"]
    for run in listed["runs"]:
        assert run["seconds"] == (stopped.result(run["name"])["seconds"] if run["done"] else None)
    assert listed["done"] == 6


@pytest.mark.usefixtures("no_ray")
def test_runs_of_another_config_in_the_same_place_are_refused(stopped):
    with pytest.raises(UserError, match=r"mean-seed0 holds a finished run with another config"):
        reproduce(replace(stopped.config, fit=replace(stopped.config.fit, epochs=1)))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ["mean", "precpc"], "reference": "mean"}, "precpc needs encoder.checkpoint"),
        ({"corpus": CorpusConfig(path="nowhere")}, r"no corpus at corpus\.path"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, changes, message):
    put_corpus(tmp_path / "tones", each=2)
    with pytest.raises(UserError, match=message):
        reproduce(settings(tmp_path, **changes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tones"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["overrides.raw.fit.epoch=3"],
            r"unknown key|overrides\.raw: fit\.epoch is not a key .*did you mean fit\.epochs",
        ),
        (["system=mfcc"], r"give systems=\[\.\.\.\]"),
        (["seed=3"], r"seed=3 are for a single run"),
        (["systems=[mean,mfcc]"], "reference='random' is not one of mean, mfcc"),
        (["systems=[random,mfc]"], r"systems='mfc' is not one of .*did you mean mfcc"),
        (["seeds=[1,1]"], r"seeds=\[1, 1\] is empty or has a value twice"),
        (["seeds=[]"], r"seeds=\[\] is empty"),
        (["workers=0"], "workers=0 is below 1"),
        (["run_dir="], "run_dir is empty"),
        (["overrides.raw.classify=true"], r"system raw: classify=true takes fixed features"),
    ],
)
def test_a_config_that_makes_no_table_is_refused_with_the_way_out(changes, message):
    with pytest.raises(UserError, match=message):
        configs.load(ReproduceConfig, EMODB, changes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"mfcc": {"fit": {"epoch": 3}}},
            r"overrides\.mfcc: fit\.epoch is not a key of the recipe \(did you mean fit\.",
        ),
        ({"mfcc": {"fit.epochs": 0}}, r"system mfcc: .*overrides\.mfcc\.KEY"),
        ({"mfcc": {"protocol.split": "loso"}}, r"protocol\.split has to be the same for all systems"),
        ({"mfcc": {"corpus": {"max_s": 3.0}}}, r"corpus\.max_s has to be the same"),
        ({"mfcc": {"pretraining": {"seed": 3}}}, r"pretraining\.seed has to be the same"),
        ({"mfcc": 3}, r"overrides\.mfcc=3 is not a mapping"),
        ({"mfc": {}}, r"overrides='mfc' is not one of .*did you mean mfcc"),
    ],
)
def test_overrides_that_no_run_could_follow_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        settings(tmp_path, overrides=overrides)


def test_an_override_may_be_dotted_or_nested(tmp_path):
    dotted = settings(tmp_path, overrides={"mfcc": {"fit.epochs": 7}}).recipe("mfcc")
    assert dotted == settings(tmp_path, overrides={"mfcc": {"fit": {"epochs": 7}}}).recipe("mfcc")
    assert dotted.fit.epochs == 7


def test_the_seed_keys_all_that_is_drawn_and_only_systems_that_draw_run_with_each(tmp_path):
    config = settings(tmp_path)
    seeded = with_seed(config.recipe("random"), 5)
    assert (seeded.seed, seeded.pretraining.seed) == (5, 5)
    drawing = [system for system in SYSTEMS if depends_on_seed(config.recipe(system))]
    assert drawing == ["random", "mfcc", "logmel", "raw", "minicpc", "precpc"]
    by_svr = {name: replace(config.recipe(name), head="svr") for name in SYSTEMS if name != "raw"}
    assert [name for name, each in by_svr.items() if depends_on_seed(each)] == ["random", "minicpc"]


def test_the_emodb_table_has_all_nine_systems_and_follows_the_quickstart_pretraining():
    config = configs.load(ReproduceConfig, EMODB)
    assert config.systems == ReproduceConfig().systems
    assert len(config.systems) == 9
    assert (len(config.seeds), config.protocol.split) == (5, "speakers5")
    assert {system: config.recipe(system).classify for system in config.systems} == dict.fromkeys(
        config.systems, True
    ) | {"raw": False}
    pretraining = configs.load(PretrainConfig, str(CONFIGS / "pretrain" / "quickstart.yaml"))
    assert config.encoder.checkpoint == pretraining.run_dir
    assert config.pretraining.model == pretraining.model


@pytest.mark.usefixtures("no_ray")
def test_one_checkpoint_serves_all_systems_that_use_one(tmp_path):
    put_corpus(tmp_path / "tones")
    checkpoint = put_checkpoint(tmp_path / "pretrained")
    base = settings(tmp_path, systems=["random", "raw", "minicpc", "precpc"], dry_run=True)
    pretraining = Recipe(model=TINY, train=TrainConfig(steps=20, batch=4, lanes=2))
    config = replace(base, encoder=replace(base.encoder, checkpoint=checkpoint), pretraining=pretraining)
    listed = reproduce(config)
    assert [run["name"] for run in listed["runs"]] == [
        f"{system}-seed{seed}" for seed in (0, 1) for system in config.systems
    ]
