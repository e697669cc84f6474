import contextlib
import csv
import io
import json
import os
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from commands import long
from made_voices import put_checkpoint, put_corpus, recipe
from stores import store

from cpcscale import config as configs
from cpcscale.cluster import fold_tasks, session
from cpcscale.cluster.fold_tasks import SharedFold, _RankDiedError, _root_cause, run_shared
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.finetune_result import combine_folds
from cpcscale.emotion.heads.training import FitConfig
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.recipe import SYSTEMS, EmotionRecipe, ProtocolConfig
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError
from cpcscale.experiments.finetune import FinetuneConfig, finetune, identify
from cpcscale.tracking.runs import read_runs
from cpcscale.tracking.store import TrackingConfig
from cpcscale.train.ranks import PeerLostError

CONFIGS = Path(__file__).parents[2] / "configs"


def settings(folder: Path, system: str, checkpoint: str = "") -> FinetuneConfig:
    base = recipe(folder / "tones", system, checkpoint)
    parts = {field.name: getattr(base, field.name) for field in fields(EmotionRecipe)}
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    return FinetuneConfig(**parts, run_dir=str(folder / "run"), tracking=tracking)


@pytest.fixture
def no_ray(monkeypatch) -> None:
    def connect(workers: int = 1) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(session, "connect", connect)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three folds under Ray, two at a time."""
    folder = tmp_path_factory.mktemp("finetune")
    store(folder)
    put_corpus(folder / "tones")
    config = settings(folder, "precpc", put_checkpoint(folder / "pretrained"))
    return config, finetune(config)


def test_folds_under_ray_give_what_they_give_in_one_process(finished):
    config, result = finished
    prepared = prepare(config, open_corpus(config.corpus))
    alone = combine_folds(config, prepared, [run_fold(config, prepared, fold) for fold in range(3)])
    assert result.ccc == pytest.approx(alone.ccc, abs=1e-5)
    assert [fold["chosen"]["epoch"] for fold in result.folds] == [fold["chosen"]["epoch"] for fold in alone.folds]


def test_the_run_folder_and_the_tracker_hold_the_result(finished):
    config, result = finished
    stored = json.loads(Path(config.run_dir, "result.json").read_text())
    assert stored == json.loads(json.dumps(result.as_dict()))
    assert Path(config.run_dir, "predictions.csv").read_text() == result.predictions_csv
    (run,) = read_runs(config.tracking)
    assert (run.run_id, run.kind, run.status, run.name) == (result.run_id, "finetune", "FINISHED", "precpc")
    assert run.metrics["ccc_mean"] == pytest.approx(result.ccc["mean"])
    assert [epoch for epoch, _ in run.history("fold2_dev_ccc")] == [1, 2]
    assert json.loads(run.artifact("result.json") or b"") == stored
    assert run.artifact("predictions.csv") == result.predictions_csv.encode()
    assert {name: run.tag(name) for name in ("system", "corpus", "protocol", "marks", "fingerprint")} == {
        "system": "precpc",
        "corpus": "tones",
        "protocol": "speakers3",
        "marks": "",
        "fingerprint": "f" * 64,
    }


def test_two_ranks_train_a_fold_to_what_one_does_and_their_number_is_no_part_of_the_run(finished):
    """Predictions to 1e-5 on a scale of four units; the run counts as the same one."""
    config, result = finished
    corpus = open_corpus(config.corpus)
    assert identify(replace(config, ranks=2), corpus) == identify(config, corpus)
    session.connect(2)
    fold = run_shared(SharedFold(ray.put((config, prepare(config, corpus))), 0, 2, 1.0, False, 1))
    alone = [row for row in csv.DictReader(io.StringIO(result.predictions_csv)) if row["fold"] == "0"]
    guess_UP = np.array([[float(row[f"{name}_hat"]) for name in PRIMITIVES] for row in alone])
    np.testing.assert_allclose(fold.guess_UP, guess_UP, atol=1e-5)
    expected = [row["train_loss"] for row in result.curves if row["fold"] == 0]
    assert [epoch.train_loss for epoch in fold.curve] == pytest.approx(expected, abs=1e-6)


@long
def test_a_fold_of_which_a_rank_dies_begins_again(finished, tmp_path):
    mark = str(tmp_path / "died")

    def arrive() -> str:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            os._exit(1)
        return mark

    class DiesOnce:
        """Ends the first process in which it arrives."""

        def __reduce__(self):
            return arrive, ()

    config, result = finished
    session.connect(2)
    prepared = replace(prepare(config, open_corpus(config.corpus)), source={"dies": DiesOnce()})
    fold = run_shared(SharedFold(ray.put((config, prepared)), 0, 2, 1.0, False, 1))
    assert Path(mark).exists()
    assert fold.curve[-1].train_loss == pytest.approx(
        [row["train_loss"] for row in result.curves if row["fold"] == 0][-1], abs=1e-6
    )


def test_a_users_error_of_one_rank_is_told_and_not_that_the_others_lost_it():
    failures = [PeerLostError("Connection closed by peer"), UserError("the loss is nan"), RuntimeError("a bug")]
    assert str(_root_cause(failures)) == "the loss is nan"
    assert str(_root_cause(failures[::2])) == "a bug"
    assert isinstance(_root_cause(failures[:1]), _RankDiedError)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 7}, r"ranks=7 are more than the utterances of a batch, fit\.batch=6"),
        ({"ranks": 2, "head": "svr"}, r"head=svr is fitted or pretrained by one process: use ranks=1"),
        ({"ranks": 2, "system": "minicpc"}, r"system=minicpc is fitted or pretrained by one process"),
        ({"ranks": 6}, r"ranks=6 needs a core for each rank, and this machine has 4: lower ranks"),
        ({"ranks": 3, "fit": FitConfig(batch=6)}, r"ranks=3 needs 3 GPUs, one a rank, and this machine has 2"),
    ],
)
def test_more_ranks_than_can_share_a_fold_are_refused_before_ray_starts(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(fold_tasks, "usable_cores", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    put_corpus(tmp_path / "tones", each=2)
    config = settings(tmp_path, "precpc", put_checkpoint(tmp_path / "pretrained"))
    with pytest.raises(UserError, match=message):
        finetune(replace(config, **changes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pretrained", "tones"]


@pytest.mark.usefixtures("no_ray")
def test_a_finished_run_is_given_back_and_not_run_again(finished):
    config, result = finished
    elsewhere = replace(config, workers=1, name="a name changes nothing")
    assert finetune(elsewhere) == result


@pytest.mark.usefixtures("no_ray")
def test_a_finished_run_of_another_config_encoder_or_corpus_is_refused(finished, tmp_path):
    config, _ = finished
    with pytest.raises(UserError, match=r"finished run with another config: pass run_dir=FOLDER"):
        finetune(replace(config, seed=1))
    other = put_checkpoint(tmp_path / "other", seed=8)
    with pytest.raises(UserError, match="another encoder"):
        finetune(replace(config, encoder=replace(config.encoder, checkpoint=other)))
    larger = put_corpus(tmp_path / "tones", each=7)
    with pytest.raises(UserError, match="another corpus"):
        finetune(replace(config, corpus=replace(config.corpus, path=str(larger))))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config: replace(config, corpus=replace(config.corpus, path="nowhere")), r"no corpus at corpus\.path"),
        (lambda config: replace(config, protocol=ProtocolConfig(split="speakers7")), "6 speakers cannot fill"),
        (lambda config: replace(config, encoder=replace(config.encoder, checkpoint="nowhere")), "no pretraining at"),
        (lambda config: Path(config.corpus.path, "00.wav").write_bytes(b"x") and config, "cannot be used"),
    ],
)
def test_bad_input_is_refused_before_ray_starts_and_leaves_nothing_behind(tmp_path, spoil, message):
    put_corpus(tmp_path / "tones", each=2)
    config = spoil(settings(tmp_path, "precpc", put_checkpoint(tmp_path / "pretrained")))
    with pytest.raises(UserError, match=message):
        finetune(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pretrained", "tones"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_quickstart_is_one_config_for_all_systems_and_follows_the_quickstart_pretraining(system):
    config = configs.load(FinetuneConfig, str(CONFIGS / "finetune" / "quickstart.yaml"), [f"system={system}"])
    pretraining = configs.load(PretrainConfig, str(CONFIGS / "pretrain" / "quickstart.yaml"))
    assert config.run_dir == f"runs/finetune/quickstart-{system}"
    assert config.encoder.checkpoint == pretraining.run_dir
    assert config.pretraining.model == pretraining.model


def test_emodb_is_the_papers_recogniser_and_its_missing_folder_says_what_to_pass():
    config = configs.load(FinetuneConfig, str(CONFIGS / "finetune" / "emodb.yaml"), [])
    assert config.recogniser == EmotionRecipe().recogniser
    with pytest.raises(UserError, match=r"no corpus at corpus\.path=.*pass corpus\.path=FOLDER"):
        open_corpus(config.corpus)
