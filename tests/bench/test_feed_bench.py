"""Promises of `cpcscale bench`: the keys that scripts rely on, and times that add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpcscale.bench.feed import FeedBenchConfig, bench_feed
from cpcscale.bench.order_at_scale import bench_plan
from cpcscale.cli import main
from cpcscale.errors import UserError
from cpcscale.report.terminal.bench import feed_lines, plan_lines
from cpcscale.stream.feed import FeedConfig
from cpcscale.stream.window import WindowConfig

PLACES = {"memory", "warm", "store"}


@pytest.fixture(scope="module")
def result() -> dict:
    speech = str(Path(__file__).parents[1] / "data" / "speech")
    made = {"audio": speech, "hours": 0.02, "utterance_s": 3, "shard_mb": 0.3}
    window = WindowConfig(kind="crop", seconds=1.0)
    return bench_feed(FeedBenchConfig(**made, window=window, batch=4, lanes=2, runs=2, feed=FeedConfig(prefetch=2)))


def test_the_result_has_what_scripts_rely_on(result):
    assert result["decoder_audio_s_per_s"] > 0
    assert set(result["audio_s_per_s"]) == PLACES
    assert all(rate > 0 for rate in result["audio_s_per_s"].values())
    for name in ("ratio_memory", "ratio_warm", "ratio_store", "fetched_over_used", "raw_ranged_mb_per_s"):
        assert result[name] > 0, name
    assert result["peers"] == {}
    assert result["audio_s"] == 24, "0.02 h are 24 utterances, each with a window of a second"


def test_the_seconds_of_the_decode_threads_add_up_to_wall_time(result):
    for place in PLACES:
        spent = dict(result["seconds"][place])
        wall = spent.pop("wall")
        assert set(spent) == {"wait", "fetch", "verify", "decode", "collate", "other"}
        assert sum(spent.values()) == pytest.approx(wall, abs=1e-3)
        assert spent["decode"] > 0


def test_every_figure_is_told(result):
    text = "\n".join(feed_lines(result))
    for words in ("decoder alone", "RAM disk", "cache", "object store", "raw ranged reads", "seconds of decode"):
        assert words in text


def test_a_plan_loses_no_window_and_its_position_is_small():
    planned = bench_plan(shards=3000, lanes=64, rows=20_000)
    assert planned["lost_share"] == 0
    assert planned["position_kib"] < 64
    assert planned["count_rows"] == 20_000
    assert planned["count_windows"] > 20_000
    assert "64 lanes" in plan_lines(planned)[0]


def test_mistakes_are_one_line(capsys):
    with pytest.raises(UserError, match="fewer than --lanes"):
        bench_plan(shards=3, lanes=64, rows=10)
    assert main(["bench", "feed", "absent.yaml"]) == 2
    assert "no config file absent.yaml" in capsys.readouterr().err


def test_the_command_prints_one_json_object(capsys):
    assert main(["bench", "plan", "--shards", "50", "--lanes", "4", "--rows", "100", "--json"]) == 0
    assert {"seconds", "peak_mib", "position_kib", "lost_share"} <= set(json.loads(capsys.readouterr().out))
