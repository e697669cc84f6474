"""What `cpcscale size` promises: the part that holds a run up, by name, before anything is taken or written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import speech
from commands import long

from cpcscale import config
from cpcscale.cli import main
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.errors import UserError
from cpcscale.size.machines import Machines
from cpcscale.size.plan import RunSize, _run_size
from cpcscale.size.rates import Rates
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train.setup import Data

ONE = Machines(nodes=1, gpus_per_node=4, cores_per_node=16, store_mb_per_s=0, network_gbit_per_s=100)
FAST = Rates(update=1000, decode=2000)


def sized(shards: Path, machines: Machines = ONE, speed: Rates = FAST, *keys: str, remote: bool = False) -> RunSize:
    recipe = config.load(PretrainConfig, None, [*speech.TINY, "train.steps=100", *keys])
    data = speech.data(shards, validate=True)
    if remote:
        # Its shards in a bucket, its utterances in memory: nothing is read there.
        index = replace(data.train, base="s3://bucket/set", memory=data.train.utterances)
        data = Data(index, data.validation)
    order = RunOrder(shard_windows(data.train, recipe.window), recipe.seed, recipe.train.lanes, recipe.train.batch)
    return _run_size(recipe, data, order, machines, speed)


def test_what_takes_longest_is_the_bottleneck_and_the_step(shards):
    slow_store = replace(ONE, store_mb_per_s=0.5)
    for name, found in (
        ("update", sized(shards)),
        ("decode", sized(shards, ONE, Rates(update=1000, decode=100), "feed.decode_threads=1")),
        ("store", sized(shards, slow_store, remote=True)),
        ("network", sized(shards, replace(ONE, nodes=2, network_gbit_per_s=0.01))),
    ):
        assert found.bottleneck == name
        assert found.step_s == found.steps_s[name] == max(found.steps_s.values())


def test_a_local_disk_and_a_single_node_have_neither_store_nor_network(shards):
    found = sized(shards, replace(ONE, store_mb_per_s=0.001, network_gbit_per_s=0.001))
    assert found.steps_s["store"] == found.steps_s["network"] == found.reading.cache_gb == 0


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_the_batch_is_shared_and_all_of_it_is_heard(shards, nodes, gpus):
    one, many = (sized(shards, replace(ONE, nodes=n, gpus_per_node=each)) for n, each in ((1, 1), (nodes, gpus)))
    assert many.workers * many.windows_per_worker == 16
    assert many.step_s == pytest.approx(one.step_s / many.workers)
    assert many.worker_hours == pytest.approx(one.worker_hours)


def test_workers_wait_for_those_that_have_one_lane_more(shards):
    three, four = (sized(shards, replace(ONE, gpus_per_node=workers)) for workers in (3, 4))
    assert (three.windows_per_worker, four.windows_per_worker) == (6, 4)
    assert three.step_s == pytest.approx(four.step_s * 6 / 4)


def test_on_cpus_decoding_takes_the_cores_of_the_update(shards):
    cpus = replace(ONE, gpus_per_node=0, cores_per_node=2)
    one, two = (sized(shards, cpus, Rates(100, decode), "workers=2").step_s for decode in (50, 25))
    heard_s, cores = 8 * 0.64, 1
    assert two - one == pytest.approx(heard_s * (1 / 25 - 1 / 50) / cores, rel=0.1)
    # An update that was measured with decoding beside it has it in it.
    one, two = (sized(shards, cpus, Rates(100, 50, beside), "workers=2").steps_s for beside in (40, 20))
    assert one["update"] == two["update"] == pytest.approx(8 * 0.64 / 100)
    assert two["decode"] == pytest.approx(2 * one["decode"])


def test_a_cache_that_holds_half_of_the_set_halves_what_is_read_later(shards):
    whole = sized(shards, replace(ONE, store_mb_per_s=100), remote=True)
    half = f"feed.cache.max_gb={whole.speech.gb / 2}"
    found = sized(shards, replace(ONE, store_mb_per_s=100), FAST, half, remote=True)
    assert whole.reading.later_mb_per_s == 0 < whole.reading.mb_per_s == found.reading.mb_per_s
    assert found.reading.later_mb_per_s == pytest.approx(found.reading.mb_per_s / 2)


def test_feeders_keep_the_workers_fed(shards):
    keys, speed = ["feed.kind=actors"], Rates(update=1000, decode=150)
    one = sized(shards, ONE, speed, *keys)
    enough = sized(shards, ONE, speed, *keys, f"feed.actors={one.feeders_per_worker}")
    assert (one.bottleneck, enough.bottleneck) == ("decode", "update")


def test_machines_that_cannot_be_are_refused_with_the_way_out(shards, capsys):
    base = ["size", "configs/pretrain/quickstart.yaml", f"data.shards={shards}", *speech.TINY]
    for more, words in (
        (["--nodes", "9", "--gpus-per-node", "1", "--update-rate", "9"], "use at most 8 workers"),
        (["--nodes", "2", "workers=1"], "leave some of --nodes=2 without a worker"),
        (["--nodes", "0"], "--nodes=0"),
        (["--gpus-per-node", "2", "device=cpu"], "give --update-rate"),
        (["--network-gbit-s", "0"], "is not a rate"),
        (["--decode-rate", "-1"], "--decode-rate=-1"),
        (["data.shards=/no/such"], "no shard set at data.shards=/no/such"),
    ):
        assert main([*base, *more]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="--cores-per-node=0"):
        replace(ONE, cores_per_node=0)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=long)])
def test_it_measures_what_it_was_not_given_and_leaves_nothing_behind(shards, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "pretrain" / "quickstart.yaml"
    before = sorted(shards.rglob("*"))
    keys = [f"data.shards={shards}", *speech.TINY, f"workers={workers}", "train.steps=60"]
    assert main(["size", str(config), *keys, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["update_audio_s_per_s"] > 0 and found["decode_audio_s_per_s"] > 0
    assert (found["workers"], found["steps"]) == (workers, 60)
    assert not list(tmp_path.iterdir()) and sorted(shards.rglob("*")) == before
    given = ["--update-rate", "123", "--decode-rate", "4567"]
    assert main(["size", str(config), *keys, *given]) == 0
    told = capsys.readouterr().out
    assert "updates on 123.0 audio s/s (given), a core decodes 4,567 (given)" in told
    assert "bottleneck     the update" in told
