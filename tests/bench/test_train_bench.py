import json
from pathlib import Path

import pytest
import speech
import torch

from cpcscale import config
from cpcscale.bench.plain import PlainCPC
from cpcscale.bench.train import TrainBenchConfig, bench_train
from cpcscale.cli import main
from cpcscale.model.cpc import build
from cpcscale.report.bench import train_lines

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
    assert 0 <= result["data_wait_share"] <= 1
    assert result["peak_mib"] > 100
    # Nothing in memory, the limit included, is faster than its own matrix products.
    assert result["audio_s_per_s"]["memory"] < result["gemm_limit_audio_s_per_s"]
    assert len(train_lines(result)) > 8


def test_the_account_of_an_update_adds_up_to_its_wall_time(made):
    for account in made[0]["seconds"].values():
        assert {"copy", "forward", "objective", "backward", "optimiser", "unattributed", "wall"} <= set(account)
        assert sum(account.values()) == pytest.approx(2 * account["wall"], abs=1e-3)


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
    ("arguments", "words"), [(["plan", "--profile", "x"], "train"), (["train", "--peers"], "feed")]
)
def test_a_flag_of_another_bench_is_refused(capfd, arguments, words):
    assert main(["bench", *arguments]) == 2
    assert f"is of `bench {words}`" in capfd.readouterr().err.splitlines()[-1]
