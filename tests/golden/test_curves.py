"""Frozen losses: a refactoring that changes what is computed changes them.

Whoever means to change them writes the new ones with `python -m pytest tests/golden --golden-write`, and says why.
"""

import json
from pathlib import Path

import pytest
import speech
import torch

from cpcscale.train.loop import pretrain
from cpcscale.train.ranks import Ranks

CURVES = Path(__file__).parent / "curves.json"
STEPS = 20
CONFIGS = {
    "the paper's kind": {"objective__negatives": 20, "optim__learning_rate": 1e-3},
    "that of emotion.yaml": {
        "model__encoder__kind": "logmel",
        "window__seconds": 1.28,
        "objective__draw": "shared",
        "objective__score": "cosine",
        "objective__temperature": 0.1,
        "objective__acoustic__frames": 0.5,
        "objective__acoustic__window": 0.5,
        "optim__schedule": "cosine",
        "optim__warmup_steps": 3,
        "optim__learning_rate": 1e-3,
    },
    "everything else": {
        "model__encoder__norm": "channel",
        "model__context__kind": "transformer",
        "model__context__layers": 1,
        "model__context__heads": 2,
        "model__predictor__kind": "shared",
        "model__predictor__heads": 2,
        "objective__scope": "batch",
        "objective__draw": "shared",
        "objective__score": "cosine",
        "objective__temperature": 0.1,
        "objective__learn_temperature": True,
        "optim__kind": "adamw",
        "optim__schedule": "cosine",
        "optim__warmup_steps": 3,
        "optim__ema_decay": 0.9,
        "optim__learning_rate": 3e-3,
        "augment__past": True,
        "train__micro_batch": 5,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_losses_of_twenty_steps_are_those_that_were_frozen(name, shards, tmp_path, request):
    recipe = speech.recipe(train__steps=STEPS, checkpoint__every_steps=STEPS, **CONFIGS[name])
    watcher = speech.Watcher()
    pretrain(recipe, speech.data(shards), str(tmp_path / "run"), Ranks(0, 1, 1, torch.device("cpu")), watcher)
    losses = [round(watcher.losses[step], 5) for step in range(1, STEPS + 1)]
    curves = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    if request.config.getoption("--golden-write"):
        CURVES.write_text(json.dumps(curves | {name: losses}, indent=1) + "\n")
    # Other processors round otherwise, and twenty steps let that grow.
    assert losses == pytest.approx(json.loads(CURVES.read_text())[name], rel=2e-3)
