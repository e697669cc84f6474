"""The stall account adds up to wall time, whatever is marked, and blames who held the loop."""

import time
from pathlib import Path

import pytest
import speech
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.time_by_name import TimeByName
from cpcscale.train.device import make_timeline
from cpcscale.train.loop import pretrain
from cpcscale.train.ranks import Ranks
from cpcscale.train.time_account import (
    HIDDEN,
    PHASES,
    HiddenSeconds,
    TimeAccount,
    TimeTotals,
    attribute_time,
    peak_tflops,
    utilisation,
)

SECONDS = st.floats(0, 1e4, allow_nan=False)
SPENT = st.dictionaries(st.sampled_from([*PHASES, "wait", "no phase of ours"]), SECONDS)
BESIDE = st.builds(HiddenSeconds, *[SECONDS] * 5)


class Laps(speech.Watcher):
    """Keeps the metrics of every logged step."""

    def __init__(self) -> None:
        super().__init__()
        self.laps: list[dict[str, float]] = []

    def metrics(self, step, values):
        super().metrics(step, values)
        if "loss" in values:
            self.laps.append(dict(values))


@pytest.fixture(scope="module")
def laps(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    watcher, folder = Laps(), tmp_path_factory.mktemp("laps")
    recipe = speech.recipe(train__steps=12, train__validate_every_steps=4, checkpoint__every_steps=5)
    data = speech.data(shards, validate=True)
    pretrain(recipe, data, str(folder), Ranks.current(torch.device("cpu")), watcher)
    return watcher.laps


@given(SPENT, BESIDE, SECONDS)
def test_the_account_adds_up_to_wall_time_whatever_was_marked(spent, beside, wall_s):
    account = attribute_time(spent, beside, wall_s, 1.0)
    assert list(account.exposed_s) == list(PHASES)
    assert sum(account.exposed_s.values()) == pytest.approx(wall_s, abs=1e-6)
    assert all(seconds >= 0 for name, seconds in account.exposed_s.items() if name != "unattributed")
    assert list(account.hidden_s) == list(HIDDEN)
    assert all(seconds >= 0 for seconds in account.hidden_s.values())


def test_a_wait_for_the_feed_is_that_of_what_its_threads_did_meanwhile():
    account = attribute_time({"wait": 8.0, "forward": 2.0}, HiddenSeconds(store_s=9.0, decode_s=3.0), 10.0, 0.0)
    assert (account.exposed_s["store"], account.exposed_s["decode"]) == (6.0, 2.0)
    assert (account.hidden_s["store"], account.hidden_s["decode"]) == (3.0, 1.0)
    assert account.rates()["data_wait_share"] == pytest.approx(0.8)
    idle = attribute_time({"wait": 1.0}, HiddenSeconds(), 1.0, 0.0)
    assert (idle.exposed_s["store"], idle.exposed_s["decode"]) == (0.0, 1.0)


def test_what_the_backward_pass_waits_for_other_ranks_is_not_its_own():
    account = attribute_time(
        {"backward": 5.0, "allreduce": 1.0}, HiddenSeconds(allreduce_s=4.0, allreduce_exposed_s=1.5), 6.0, 0.0
    )
    assert (account.exposed_s["backward"], account.exposed_s["allreduce"]) == (3.5, 2.5)
    assert account.hidden_s["allreduce"] == 2.5


def test_rates_leave_validation_and_checkpoints_out():
    account = attribute_time({"forward": 4.0, "validation": 5.0, "checkpoint": 1.0}, HiddenSeconds(), 10.0, 80.0)
    assert account.rates() == {"audio_s_per_s": pytest.approx(20.0), "data_wait_share": 0.0}


def test_time_between_phases_is_unattributed_and_marks_of_the_step_go_before_the_phase_around_them():
    account = TimeByName()
    meter = TimeAccount(account)
    time.sleep(0.02)
    with meter.phase("logging"):
        time.sleep(0.02)
        account.mark("copy")
        time.sleep(0.02)
    meter.count_audio(3.0)
    lap = meter.lap(HiddenSeconds(), "checkpoint")
    for name in ("unattributed", "copy", "logging"):
        assert lap.exposed_s[name] >= 0.02
    assert lap.audio_s == 3.0


def test_laps_add_up_to_the_total():
    account = TimeByName()
    meter, laps = TimeAccount(account), []
    for number in range(3):
        with meter.phase("forward"):
            meter.count_audio(number)
        laps.append(meter.lap(HiddenSeconds(store_s=number), "logging"))
    total = sum(laps, TimeTotals())
    assert total == meter.total
    assert sum(meter.total.exposed_s.values()) == pytest.approx(meter.total.wall_s)


def test_a_run_says_at_every_logged_step_where_all_of_its_time_went(laps):
    assert len(laps) == 12
    for values in laps:
        shares = {name: value for name, value in values.items() if name.startswith("time_")}
        assert set(shares) == {f"time_{name}" for name in PHASES}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(values[f"hidden_{name}"] >= 0 for name in HIDDEN)
        assert values["memory_peak_mib"] > 0
        # No peak is known of a CPU.
        assert "mfu" not in values
    for name in ("forward", "backward", "objective", "optimiser", "copy", "logging"):
        assert all(values[f"time_{name}"] > 0 for values in laps)
    # What is done after the record of a step stands in the next one.
    assert laps[4]["time_validation"] > 0
    assert laps[5]["time_checkpoint"] > 0


def test_little_of_a_run_is_unattributed(laps):
    assert sum(values["time_unattributed"] for values in laps) / len(laps) < 0.1


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H200", 989.5, 67.0),
        ("NVIDIA H100 80GB HBM3", 989.5, 67.0),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA L4", 121.0, 30.3),
        ("Tesla V100-SXM2-16GB", 125.0, 15.7),
        ("NVIDIA L40", None, None),
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_a_peak_is_that_of_the_very_gpu_or_none(name, half, single):
    assert (peak_tflops(name, "bf16"), peak_tflops(name, "fp32")) == (half, single)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_time_of_a_gpu_is_that_of_what_it_was_asked_for():
    device = torch.device("cuda")
    matrix, line = torch.ones(4096, 4096, device=device), make_timeline(device)
    line.mark("")
    for _ in range(20):
        matrix = matrix @ matrix * 1e-4
    line.mark("product")
    line.mark("nothing")
    began = time.perf_counter()
    torch.cuda.synchronize()
    waited_s = time.perf_counter() - began
    seconds = line.seconds()
    assert seconds["product"] > 0.5 * waited_s
    assert seconds["nothing"] < 0.1 * seconds["product"]
    assert (utilisation(device, "fp32", 1e12) or 1) > 0
