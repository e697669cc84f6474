"""`cpcscale pretrain` as its user meets it, up to the start of Ray: configs that are read and input that is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import checkpoints
import pytest
import ray
import speech
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental.internal_kv import _internal_kv_get
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.preemption import PreemptionContext

from cpcscale import cli, config
from cpcscale.cluster.capacity import check_capacity, wait_for_capacity
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.errors import UserError
from cpcscale.runs import lease

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
QUICKSTART, PAPER = str(CONFIGS / "quickstart.yaml"), str(CONFIGS / "paper.yaml")


def listing(*folders: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for folder in folders for path in folder.rglob("*")}


@pytest.fixture
def place(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with the shard set beside it and a run to be in `run`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards, tmp_path / "shards")
    return tmp_path


def refused(place: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line in which the command line refuses this, with status 2 and nothing written."""
    before = listing(place)
    assert cli.main(["pretrain", *arguments]) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1, error
    assert error.startswith("cpcscale: error: ")
    assert listing(place) == before
    return error.removeprefix("cpcscale: error: ").strip()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"kind": "overwrites", "method": "PUT"}, ("If-None-Match", "two drivers", "run_dir")),
        ({"kind": "status", "status": 400, "code": "ExpiredToken"}, ("ExpiredToken", "AWS_SESSION_TOKEN")),
    ],
    ids=["ignores", "expired"],
)
def test_a_store_on_which_no_run_can_rest_is_refused_before_ray_starts(place, capfd, faulty_s3, fault, words):
    faulty_s3.fail(**fault)
    told = refused(place, capfd, QUICKSTART, "data.shards=shards", "data.audio=", f"run_dir={faulty_s3.base}/run")
    assert all(word in told for word in (f"{faulty_s3.base}/run", *words)), told
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=5", "unknown key train.stepz (did you mean train.steps?)"),
        ("trian.steps=5", "did you mean train?"),
        ("worker=1", "did you mean workers?"),
        ("train.steps=abc", "'abc'"),
        ("train.steps=1.5", "1.5"),
        ("train.steps=-3", "train.steps=-3 is below 0"),
        ("train=3", "train is a group of keys"),
        ("steps", "key=value"),
        ("workers=9", "9 workers share train.lanes=8 lanes and some would have none: use at most 8 workers"),
        ("workers=0", "workers=0 is below 1"),
        ("workers=two", "workers=two is neither a number nor [least, most]: write 4, or [2, 8]"),
        ("workers=2.5", "workers=2.5 is neither a number nor [least, most]"),
        ("workers=true", "workers=True is neither a number nor [least, most]"),
        ("workers=null", "workers=None is neither a number nor [least, most]"),
        ("workers={least: 1}", "workers={'least': 1} is neither a number nor [least, most]"),
        ("workers=[2]", "workers=[2] is neither a number nor [least, most]"),
        ("workers=[1,2,3]", "workers=[1, 2, 3] is neither a number nor [least, most]"),
        ("workers=[1,2.5]", "workers=[1, 2.5] is neither a number nor [least, most]"),
        ("workers=[3,2]", "workers=[3, 2] has a minimum above its maximum: write [2, 3]"),
        ("workers=[0,2]", "workers=0 is below 1"),
        ("workers=[1,9]", "9 workers share train.lanes=8 lanes and some would have none: use at most 8 workers"),
        ("max_failures=-2", "max_failures=-2 is below -1"),
        ("stop_grace_s=-1", "stop_grace_s=-1.0 is below 0"),
        ("start_wait_s=-1", "start_wait_s=-1.0 is below 0"),
        ("grow_every_s=0", "grow_every_s=0.0 is below 1"),
        ("device=tpu", "'tpu'"),
        ("train.precision=fp61", "'fp61'"),
        ("train.batch=33", "train.batch=33 is not a multiple of train.lanes=8"),
        ("window.seconds=0.1", "too short to predict"),
        ("order.run=3", "order.run=3 does not divide train.batch / train.lanes = 4"),
        ("objective.pooled.weight=-1", "objective.pooled.weight=-1"),
        ("window.seconds=1.283", "use 1.28 s"),
        ("model.encoder.kernels=[10,8]", "differ in length"),
        ("optim.learning_rate=nan", "optim.learning_rate=nan"),
        ("data.shards=gs://bucket/set", "gs://"),
        ("data.pack.heldout_share=1.5", "heldout_share=1.5"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_it(place, capfd, override, words):
    assert words in refused(place, capfd, QUICKSTART, "data.shards=shards", "run_dir=run", override)


@pytest.mark.parametrize("place_of_flag", [0, 1, 2, 3])
def test_json_may_stand_anywhere_among_the_arguments(place, capfd, place_of_flag):
    arguments = [QUICKSTART, "data.shards=shards", "train.stepz=5"]
    arguments.insert(place_of_flag, "--json")
    assert "did you mean train.steps?" in refused(place, capfd, *arguments)


def test_a_missing_config_is_refused_by_its_path(place, capfd):
    assert "no config file nowhere.yaml" in refused(place, capfd, "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1", "not YAML"), ("- 1\n- 2\n", "holds a list"), ("train: {stepz: 3}\n", "did you mean train.steps?")],
)
def test_a_malformed_config_is_refused_by_its_path(place, capfd, text, words):
    (place / "mine.yaml").write_text(text)
    line = refused(place, capfd, "mine.yaml", "data.shards=shards")
    assert "mine.yaml" in line and words in line


def test_missing_shards_are_refused_with_the_command_that_makes_them(place, capfd):
    line = refused(place, capfd, PAPER, "data.shards=nowhere", "workers=1")
    assert "no shard set at" in line
    assert re.search(r"`cpcscale pack AUDIO \S*nowhere`", line), "the command makes nowhere/train"


def test_missing_audio_to_pack_first_is_refused(place, capfd):
    line = refused(place, capfd, QUICKSTART, "data.shards=nowhere", "data.audio=no-audio", "run_dir=run")
    assert "no-audio" in line


def test_a_run_folder_of_another_shard_set_is_refused_with_both_fingerprints(place, capfd):
    identity = config.load(PretrainConfig, QUICKSTART).identity()
    checkpoints.publish("run", checkpoints.position(20, fingerprint="0123456789abcdef" * 4, identity=identity))
    line = refused(place, capfd, QUICKSTART, "data.shards=shards", "run_dir=run")
    for words in ("another shard set", "0123456789ab", speech.data(place / "shards").train.fingerprint[:12]):
        assert words in line
    assert "name another run_dir" in line


def test_a_run_folder_of_another_recipe_is_refused_by_the_key_that_differs(place, capfd):
    identity = config.load(PretrainConfig, QUICKSTART, ["train.batch=64"]).identity()
    fingerprint = speech.data(place / "shards").train.fingerprint
    checkpoints.publish("run", checkpoints.position(20, fingerprint=fingerprint, identity=identity))
    line = refused(place, capfd, QUICKSTART, "data.shards=shards", "run_dir=run")
    assert "train.batch=64, this config says 32" in line


def test_a_run_that_another_driver_holds_is_refused_with_who_and_the_way_out_before_ray_starts(place, capfd):
    with lease.hold("run", lease.LeaseConfig(), take_over=False, say=print):
        line = refused(place, capfd, QUICKSTART, "data.shards=shards", "run_dir=run")
    assert f"run is held by pid {os.getpid()} on " in line
    assert "--take-over" in line


@pytest.mark.parametrize("place_of_flag", [0, 1, 2, 3])
def test_take_over_may_stand_anywhere_among_the_arguments(place, capfd, place_of_flag):
    arguments = [QUICKSTART, "data.shards=shards", "train.stepz=5"]
    arguments.insert(place_of_flag, "--take-over")
    assert "did you mean train.steps?" in refused(place, capfd, *arguments)


def test_a_damaged_index_is_refused(place, capfd):
    marker = place / "shards" / "train" / "index.json"
    marker.write_text(marker.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    assert "do not match their marker" in refused(place, capfd, QUICKSTART, "data.shards=shards", "run_dir=run")


def test_fp16_without_a_gpu_is_refused_before_anything_is_written(place):
    """In a process of its own, since a Ray is started to count the GPUs."""
    before = listing(place)
    command = [sys.executable, "-m", "cpcscale", "pretrain", QUICKSTART, "data.shards=shards", "run_dir=run"]
    command += ["train.precision=fp16", "device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_without_ray())
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("cpcscale: error: train.precision=fp16 needs a GPU")
    assert "use fp32 or bf16" in line
    assert listing(place) == before


# More lanes than any machine here has cores.
ROOMY = ["device=cpu", "train.lanes=512", "train.batch=512"]


@pytest.fixture
def cores(ray_here: None) -> int:
    """Those of the Ray that runs, which a test before may have started."""
    import ray

    return int(ray.cluster_resources()["CPU"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # Workers take all cores of a cluster that may grow, but those of nodes that have a resource for feeders.
        (
            ["workers=[1,2]", "feed.kind=actors"],
            "workers=[1, 2] take every free core, so feed.kind=actors would find none",
        ),
        (
            ["workers=[1,2]", "feed.kind=actors", "feed.actor_resource=ear"],
            "feed.actor_resource=ear: 1 feeder(s) need a unit each and the cluster has 0",
        ),
        (
            ["workers={cores}", "feed.kind=actors"],
            "workers={cores}: {cores} need a core each, and their feeders {cores} more",
        ),
        (["workers=[{more},512]"], "workers=[{more}, 512]: {more} need a core each and the cluster has {cores}"),
        (["workers=[1,2]", "device=cuda"], "device=cuda: 1 worker(s) need a GPU each and the cluster has 0"),
    ],
)
def test_workers_that_the_cluster_has_no_room_for_are_refused(cores, overrides, words):
    values = {"cores": cores, "more": cores + 1}
    written = [each.format_map(values) for each in overrides]
    with pytest.raises(UserError) as refusal:
        check_capacity(config.load(PretrainConfig, QUICKSTART, [*ROOMY, *written]))
    assert words.format_map(values) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_node_that_is_to_be_taken_away_is_heard_of_with_the_ray_at_hand():
    # Not by its public call, so a Ray that has it elsewhere is to be found here.
    assert PreemptionContext().preemption_info is None
    assert PreemptionContext in {field.type for field in fields(TrainContext) if field.name == "preemption_context"}


def asked() -> list[dict[str, float]]:
    """What the cluster's autoscaler is asked for."""
    stored = _internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    return json.loads(stored) if stored else []


def test_a_start_asks_for_the_nodes_that_it_lacks_waits_as_long_as_it_is_told_and_says_so(cores, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    said: list[str] = []
    keys = [f"workers={cores + 1}", "feed.kind=actors", "feed.actor_cpus=2", "start_wait_s=4"]
    spec = config.load(PretrainConfig, QUICKSTART, [*ROOMY, *keys])
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(wait_for_capacity, spec, said.append)
        while not asked():
            assert not starting.done()
        assert asked() == [{"CPU": 1}] * (cores + 1) + [{"CPU": 2}] * (cores + 1)
        with pytest.raises(
            UserError, match=rf"the cluster has {cores}, and not enough other nodes came in start_wait_s"
        ):
            starting.result()
    assert asked() == []
    [line] = said
    assert line.endswith(f"the cluster has {cores}; waiting 4 s at most for other nodes (start_wait_s)")


def test_a_start_on_a_ray_of_its_own_which_nobody_joins_waits_for_nothing(cores, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = config.load(PretrainConfig, QUICKSTART, [*ROOMY, f"workers={cores + 1}", "start_wait_s=100000"])
    with pytest.raises(UserError, match=r"lower workers or feed\.actors$"):
        wait_for_capacity(spec, lambda line: pytest.fail(line))


def test_a_start_with_a_precision_that_its_devices_lack_is_refused_at_once(cores):
    spec = config.load(PretrainConfig, QUICKSTART, [*ROOMY, "train.precision=fp16", "start_wait_s=1000"])
    with pytest.raises(UserError, match=r"fp16 needs a GPU .* where GPUs are to come, device=cuda with start_wait_s"):
        wait_for_capacity(spec, lambda line: pytest.fail(line))


@pytest.mark.parametrize("workers", ["{cores}", "[1,512]", "[{cores},512]"])
def test_the_least_workers_are_what_a_cluster_must_have_room_for(cores, workers):
    spec = config.load(PretrainConfig, QUICKSTART, [*ROOMY, f"workers={workers.format(cores=cores)}"])
    assert check_capacity(spec) is False


def test_the_shipped_configs_are_the_recipes_they_claim_to_be():
    quickstart, paper = config.load(PretrainConfig, QUICKSTART), config.load(PretrainConfig, PAPER)
    assert paper.model == PretrainConfig().model
    assert paper.objective == PretrainConfig().objective
    assert (paper.window.kind, paper.window.seconds, paper.train.batch, paper.train.epochs) == ("crop", 10.0, 64, 50)
    assert (paper.optim.learning_rate, paper.optim.weight_decay) == (2e-4, 1e-5)
    for recipe in (quickstart, paper):
        assert (recipe.objective.negatives, recipe.model.predictor.steps) == (50, 12)
        assert recipe.objective.chance == pytest.approx(0.0196, abs=1e-4)
    assert quickstart.data.pack.heldout_share == 0.05
    assert quickstart.data.pack.unseen_groups == [speech.UNSEEN_VOICE]


def _without_ray() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
