import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import batches
import pytest
import speech
import torch

from cpcscale import config
from cpcscale.bench.loop_without_network import LAP, StepWithoutNetwork
from cpcscale.bench.plain_network import PlainCPC
from cpcscale.bench.ranks import rank_groups
from cpcscale.bench.train import TrainBenchConfig, bench_train
from cpcscale.cli import main
from cpcscale.errors import UserError
from cpcscale.model.cpc import build
from cpcscale.report.terminal.bench import train_lines
from cpcscale.train.ranks import Ranks
from cpcscale.train.scores import reduce_scores
from cpcscale.train.step import TrainStep
from cpcscale.train.time_account import HIDDEN, PHASES

SMALL = (
    "window.seconds=1.28",
    "model.encoder.channels=16",
    "model.context.width=16",
    "model.predictor.steps=4",
    "objective.draw=shared",
    "train.batch=4",
    "train.lanes=4",
    "train.threads=1",
    "hours=0.02",
    "runs=2",
    "ranks=[2]",
    f"null_updates={LAP + 3}",
    f"audio={speech.AUDIO}",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    trace = tmp_path_factory.mktemp("bench") / "trace.json"
    return bench_train(config.load(TrainBenchConfig, None, list(SMALL)), str(trace)), trace


def test_it_measures_all_that_scripts_rely_on(made):
    result, _ = made
    assert set(result["audio_s_per_s"]) == {"memory", "feed", "each"}
    rates = [*result["audio_s_per_s"].values()]
    rates += [result[f"{name}_audio_s_per_s"] for name in ("plain_gathered", "plain_matmul", "gemm_limit")]
    assert all(rate > 0 for rate in rates)
    assert all(value > 0 for name, value in result.items() if name.startswith("ratio_"))
    assert 0 <= result["data_wait_share"] <= 1
    assert result["peak_mib"] > 100
    # Nothing in memory, the limit included, is faster than its own matrix products.
    assert result["audio_s_per_s"]["memory"] < result["gemm_limit_audio_s_per_s"]


def test_two_ranks_share_the_batch_and_are_weighed_against_one(made):
    (world, found), *more = made[0]["ranks"].items()
    assert (world, more) == ("2", [])
    assert found["memory"] > 0 and found["feed"] > 0
    assert all(ratio > 0 for ratio in found["ratio_to_one"].values())
    assert 0 <= found["data_wait_share"] <= 1
    assert found["hidden_allreduce_s"] == found["hidden"]["memory"]["allreduce"] >= 0
    # Only where there are several ranks does one wait for others.
    assert found["seconds"]["memory"]["allreduce"] > 0
    assert found["peak_mib"] > 200


def test_the_loop_without_its_network_is_weighed_against_its_feed(made):
    result, _ = made
    assert min(result["null_loop_audio_s_per_s"], result["feed_alone_audio_s_per_s"], result["null_loop_ratio"]) > 0
    without = result["seconds"]["null_loop"]
    assert without["forward"] == without["objective"] == without["backward"] == 0
    assert "copy" in without


def test_the_meter_costs_its_marks(made):
    result, _ = made
    # Around the batch, the step's own, and around the record with the end of a lap.
    assert result["meter_marks"] >= 2 + len(("copy", "forward", "objective", "backward", "optimiser")) + 3
    assert result["meter_mark_us"] > 0
    assert 0 < result["meter_share"] < result["null_meter_share"]


def test_every_account_adds_up_to_wall_time_and_has_all_phases(made):
    result, _ = made
    assert list(result["seconds"]) == ["memory", "feed", "null_loop"]
    for of in (result, result["ranks"]["2"]):
        for account in of["seconds"].values():
            assert set(account) == {*PHASES, "wall"}
            assert sum(account.values()) == pytest.approx(2 * account["wall"], abs=2e-3)
        assert list(of["hidden"]) == list(of["seconds"])
        assert all(list(each) == list(HIDDEN) and min(each.values()) >= 0 for each in of["hidden"].values())


def test_what_is_printed_has_all_of_it_but_phases_that_none_has(made):
    result, _ = made
    text = "\n".join(train_lines(result))
    for words in ("2 ranks, in memory", "2 ranks, on the feed", "the loop without its network", "the time account's"):
        assert words in text
    heads = next(line for line in train_lines(result) if "unattributed" in line).split()
    assert heads[0] == "seconds" and heads[-1] == "wall"
    assert "validation" not in heads and "checkpoint" not in heads
    assert set(heads[1:]) <= {*PHASES, "wall"}


def test_what_is_left_out_is_not_printed(made):
    result = {name: value for name, value in made[0].items() if not name.startswith(("null_", "plain_"))}
    text = "\n".join(train_lines({**result, "ranks": {}}))
    assert "ranks" not in text and "without its network" not in text and "plain" not in text


def test_an_update_without_a_network_counts_what_a_real_one_counts_and_learns_nothing():
    spec = speech.recipe()
    for objective in (spec.objective, replace(spec.objective, scope="batch")):
        recipe, ranks = replace(spec, objective=objective), Ranks.current(torch.device("cpu"))
        real, null = (
            kind(build(spec.model, 0, gain=10.0), recipe, ranks, total=9) for kind in (TrainStep, StepWithoutNetwork)
        )
        before = {name: tensor.clone() for name, tensor in null.contrast.state_dict().items()}
        with_network, without = (step(batches.made(slice(None)), 0) for step in (real, null))
        for name in ("samples", "bad", "scored", "empty"):
            assert getattr(with_network, name) == getattr(without, name)
        for one, other in zip(with_network.parts, without.parts, strict=True):
            assert torch.equal(one.count_N, other.count_N)
            assert one.sums_MN.shape == other.sums_MN.shape and not other.sums_MN.any()
        assert reduce_scores(with_network.parts, ranks).keys() == reduce_scores(without.parts, ranks).keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in null.contrast.state_dict().items())


def test_a_users_mistake_that_ranks_find_ends_the_bench_in_its_words_and_leaves_no_process(shards, tmp_path):
    gone = replace(speech.data(shards).train, base=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone"), rank_groups([2], speech.recipe(), gone, 1, tmp_path):
        pass
    assert multiprocessing.active_children() == []


def test_a_bug_in_a_rank_ends_the_bench_with_its_traceback_and_leaves_no_process(shards, tmp_path):
    wrong: Any = "two"
    with (
        pytest.raises(torch.multiprocessing.ProcessRaisedException, match="TypeError"),
        rank_groups([2], speech.recipe(), speech.data(shards).train, wrong, tmp_path),
    ):
        pass
    assert multiprocessing.active_children() == []


def test_a_rank_that_is_killed_ends_the_bench_and_leaves_no_process(shards, tmp_path):
    with rank_groups([2, 2], speech.recipe(), speech.data(shards).train, 1, tmp_path) as running:
        assert list(running) == [2]
        assert running[2].measure("memory").amount == pytest.approx(16 * 0.64, rel=0.5)
        one, _ = multiprocessing.active_children()
        os.kill(one.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="SIGKILL"):
            running[2].measure("feed")
    assert multiprocessing.active_children() == []


def test_the_trace_is_what_a_browser_reads(made):
    names = {event.get("name") for event in json.loads(made[1].read_text())["traceEvents"]}
    assert "aten::baddbmm" in names


def test_the_plain_network_is_the_same_network():
    model = build(config.load(TrainBenchConfig, None, list(SMALL)).model, 1, offset=0.01, gain=9.0)
    wave_BS = 0.1 * torch.randn(2, 8_000)
    z_BTC, c_BTD = model.features(wave_BS)
    plain_z_BTC, plain_p_BTKC = PlainCPC(model)(wave_BS)
    torch.testing.assert_close(plain_z_BTC, z_BTC, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain_p_BTKC, model.predictor(c_BTD), rtol=1e-4, atol=1e-5)


def test_a_mistyped_key_is_refused_in_one_line(capfd):
    assert main(["bench", "train", "objective.drw=each"]) == 2
    assert "objective.draw" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("override", ["model.size=small", "objective.scope=batch", "model.context.layers=2"])
def test_a_network_that_the_plain_one_is_not_is_refused_with_the_way_out(capfd, override):
    assert main(["bench", "train", override]) == 2
    assert "plain=false" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ranks=[2,8]", "train.lanes=4", "train.batch=4"], "ranks=[2, 8] share train.lanes=4"),
        (["ranks=[1]"], "ranks=1 is below 2"),
        ([f"null_updates={LAP}"], "null_updates=10 leaves nothing"),
        (["train.batch=6", "train.lanes=4"], "train.batch=6 is not a multiple of train.lanes=4"),
        (["hours=0.01", "train.batch=8", "train.lanes=8"], "fewer than train.lanes=8"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(capfd, overrides, words):
    assert main(["bench", "train", *overrides]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


def test_more_ranks_than_gpus_are_refused_where_there_are_gpus(capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["bench", "train", "ranks=[2]", "train.batch=8", "train.lanes=8"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "needs 2 GPUs, one a rank, and there are 1" in line


@pytest.mark.parametrize(
    ("arguments", "words"), [(["plan", "--profile", "x"], "train"), (["train", "--peers"], "feed")]
)
def test_a_flag_of_another_bench_is_refused(capfd, arguments, words):
    assert main(["bench", *arguments]) == 2
    assert f"is only for `bench {words}`" in capfd.readouterr().err.splitlines()[-1]
