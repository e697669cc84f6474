"""Checkpoints of the tiny recipe without a run that makes them, and ways to damage one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import batches
import speech
import torch

from cpcscale.model.cpc import build
from cpcscale.runs import checkpoint_files
from cpcscale.runs.checkpoint_files import MARKER
from cpcscale.runs.ledger import Ledger
from cpcscale.runs.publisher import Publisher
from cpcscale.train import checkpoint
from cpcscale.train.checkpoint import RestoredCheckpoint, RunPosition, checkpoint_files_of, collect_tensors
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.step import TrainStep

FILES = ("model.safetensors", "objective.safetensors", "optimizer.safetensors", "state.json", MARKER)
DAMAGES = ("missing", "empty", "truncated", "one bit flipped")
RECIPE = speech.recipe()


def trained(updates: int, seed: int = 0, spec: Recipe = RECIPE) -> TrainStep:
    model = build(spec.model, seed, offset=0.125, gain=7.0)
    step = TrainStep(model, spec, Ranks(0, 1, 1, torch.device("cpu")), total=100)
    for t in range(updates):
        step(batches.made(seed=t), t)
    return step


def position(step: int, **rest: Any) -> RunPosition:
    return RunPosition(step=step, **{"fingerprint": "f" * 64, "identity": RECIPE.identity(), **rest})


def publish(folder: Path | str, where: RunPosition, step: TrainStep | None = None, keep: int = 9) -> str:
    """A checkpoint of a process of its own, which goes on from what is there. Its weights have the seed `step`."""
    step, ledger = step or trained(0, seed=where.step), Ledger(str(folder))
    publisher = Publisher(ledger, ledger.head(), where.step, keep=keep)
    made = checkpoint_files_of(collect_tensors(step.contrast, step.optimizer), where, RECIPE)
    return publisher.publish(where.step, where.metrics.get("heldout_loss"), made)


def published(folder: Path | str, *steps: int, keep: int = 9) -> list[Path]:
    """The folders of checkpoints of these steps."""
    return [Path(publish(folder, position(step), keep=keep)) for step in steps]


def newest(folder: Path | str) -> RestoredCheckpoint | None:
    ledger = Ledger(str(folder))
    return checkpoint.load_newest(ledger, ledger.head())


def restored(folder: Path | str) -> TrainStep:
    """The newest checkpoint, put in place."""
    step, there = trained(0), newest(folder)
    assert there
    checkpoint.restore(there, step.contrast, step.optimizer)
    return step


def steps(folder: Path | str) -> list[int]:
    return [each.step for each in Ledger(str(folder)).head().checkpoints]


def whole(folder: Path | str) -> list[tuple[int, str]]:
    """(step, folder) of what lies in the run's folder and is whole, whether it counts or not."""
    ledger = Ledger(str(folder))
    return [
        (step, name)
        for name, (step, _) in ledger.folders().items()
        if not list(checkpoint_files.find_problems(f"{ledger.checkpoints}/{name}", every_byte=True))
    ]


def damage(file: Path, how: str) -> None:
    """One of DAMAGES."""
    data = file.read_bytes()
    match how:
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "truncated":
            file.write_bytes(data[: len(data) // 2])
        case "one bit flipped":
            middle = len(data) // 2
            file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
