"""What is measured by workers as a run has them: real Ray Train workers, on a Ray of this machine."""

from __future__ import annotations

import os
import tempfile

import pytest
import ray
import torch
from commands import long

from cpcscale.cluster.rehearsal import run_on_workers
from cpcscale.errors import UserError
from cpcscale.train.ranks import Ranks


@long
def test_all_workers_do_it_whatever_cluster_is_named_and_the_first_one_answers(monkeypatch, tmp_path):
    # Within the test, for workers cannot import it.
    def counted(ranks: Ranks) -> dict[str, float]:
        return {"world": float(ranks.sum(torch.ones(1))), "rank": float(ranks.rank), "pid": float(os.getpid())}

    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = run_on_workers(counted, 2, use_gpu=False)
    assert (found["world"], found["rank"]) == (2, 0)
    assert found["pid"] != os.getpid()
    assert not ray.is_initialized(), "the Ray of its own is still there"
    assert not list(tmp_path.glob("cpcscale-*"))


@long
def test_what_a_worker_refuses_is_refused_in_its_words():
    def refused(ranks: Ranks) -> dict[str, float]:
        raise UserError("no such thing: give another")

    with pytest.raises(UserError, match="no such thing: give another"):
        run_on_workers(refused, 1, use_gpu=False)
