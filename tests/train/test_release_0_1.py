"""A run of release 0.1 goes on in this one. tests/data/release_0_1 was written by 0.1 and is never made anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import speech
import torch

from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.train.checkpoint import load_encoder
from cpcscale.train.loop import pretrain
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.setup import Data

MADE = Path(__file__).parents[1] / "data" / "release_0_1"
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def recipe(**overrides: Any) -> Recipe:
    """The recipe of the run that 0.1 began: eight steps, stopped after its checkpoint of step 3."""
    keys = {"train__steps": 8, "train__batch": 8, "train__lanes": 4, "checkpoint__every_steps": 3}
    keys |= {"checkpoint__keep": 1, "model__encoder__channels": 8, "model__context__width": 8}
    keys |= {"optim__learning_rate": 0.01, "optim__ema_decay": 0.9, "optim__schedule": "cosine"}
    keys |= {"objective__score": "cosine", "objective__learn_temperature": True, "objective__temperature": 0.1}
    return speech.recipe(**{**keys, **overrides})


@pytest.fixture
def data() -> Data:
    return Data(Index.load(str(MADE / "shards")), {})


def test_it_goes_on_with_the_losses_that_0_1_had(data, tmp_path):
    shutil.copytree(MADE / "run", tmp_path / "run")
    watcher = speech.Watcher()
    pretrain(recipe(), data, str(tmp_path / "run"), ALONE, watcher)
    losses = {int(step): loss for step, loss in json.loads((MADE / "losses.json").read_text()).items()}
    assert watcher.losses == pytest.approx({step: loss for step, loss in losses.items() if step > 3}, abs=1e-5)
    assert list(watcher.losses) == [4, 5, 6, 7, 8]


def test_a_key_that_differs_is_still_refused_by_name(data, tmp_path):
    shutil.copytree(MADE / "run", tmp_path / "run")
    with pytest.raises(UserError, match=r"was trained with objective\.negatives=8, this config says 9"):
        pretrain(recipe(objective__negatives=9), data, str(tmp_path / "run"), ALONE, speech.Watcher())


def test_its_encoder_loads():
    network, facts = load_encoder(str(MADE / "run"))
    assert facts["step"] == 3
    assert network.layer(torch.zeros(1, 16_000), "c").shape == (1, 100, 8)
