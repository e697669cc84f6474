"""Promises of `cpcscale bench scale`: every window where it belongs, and every figure told."""

from __future__ import annotations

import json

import commands
import pytest

from cpcscale.cli import main
from cpcscale.report.terminal.scale import scale_lines


@commands.long
def test_the_command_measures_real_processes_and_finds_no_row_wrong(capsys):
    arguments = ["shards=4000", "utterances=48", "ranks=16", "steps=16"]
    assert main(["bench", "scale", "configs/bench/scale.yaml", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"]["wrong"] == result["feeders"]["wrong"] == 0
    assert result["utterances"] == 4000 * 48
    assert (result["rank"]["lanes"], result["rank_of_many"]["lanes"]) == (1, 16)
    assert set(result["actors"]["bytes_per_shard"]) == {"rank", "feeder", "store", "driver", "mailbox"}
    # The table and the two counts that go with it, handed over once.
    assert 100 < result["actors"]["bytes_per_shard"]["store"] < 180
    text = "\n".join(scale_lines(result))
    for words in ("feeder actor", "mailbox actor", "bytes a shard", "16 feeders in one process", "0 rows wrong"):
        assert words in text


@pytest.mark.parametrize("wrong", ["shards=10", "ranks=0", "windows=0"])
def test_a_size_that_cannot_be_is_one_line(capsys, wrong):
    assert main(["bench", "scale", "configs/bench/scale.yaml", wrong]) == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]
