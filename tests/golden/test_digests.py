"""Runs are found again by the digest of their config, in every later release: those of 0.1 are frozen here.

A test that fails here says that finished runs would run again and running ones would not go on. A key that comes after
0.1 has `metadata=config.ADDED`; one that goes is put into its class's `REMOVED`. A shipped config that is new, or means
something else on purpose, gets its digest by `python -m pytest tests/golden --golden-write`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpcscale import config
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.experiments.evaluate.config import EvaluateConfig
from cpcscale.experiments.finetune import FinetuneConfig
from cpcscale.experiments.many_runs_config import ReproduceConfig
from cpcscale.experiments.sweep.run import SweepConfig

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("digests.json")
KINDS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "sweep": SweepConfig,
    "reproduce": ReproduceConfig,
    "evaluate": EvaluateConfig,
}
SHIPPED = {
    path.relative_to(ROOT).as_posix(): kind
    for name, kind in KINDS.items()
    for path in sorted((ROOT / "configs" / name).glob("*.yaml"))
}


@pytest.mark.parametrize("path", SHIPPED)
def test_a_shipped_config_has_the_digest_that_it_always_had(path, request):
    found = config.digest(config.load(SHIPPED[path], str(ROOT / path)))
    golden = json.loads(GOLDEN.read_text())
    if request.config.getoption("--golden-write"):
        GOLDEN.write_text(json.dumps(golden | {path: found}, indent=1) + "\n")
    else:
        assert golden.get(path) == found


def test_no_digest_is_kept_of_a_config_that_is_gone():
    assert set(json.loads(GOLDEN.read_text())) == set(SHIPPED)
