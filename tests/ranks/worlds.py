"""The same work at several numbers of ranks, in real processes over gloo. Each rank leaves what it found in a file."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import batches
import speech
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cpcscale.errors import UserError
from cpcscale.model.cpc import build
from cpcscale.stream.batch import Batch
from cpcscale.train.loop import pretrain
from cpcscale.train.observer import RunRequests, StoppedError
from cpcscale.train.ranks import Ranks
from cpcscale.train.scores import reduce_scores
from cpcscale.train.step import TrainStep

STEPS, STOP = 12, 5
OBJECTIVES = {
    f"{scope} {draw}{' learnt' * learnt}": {
        "objective__scope": scope,
        "objective__draw": draw,
        "objective__score": "cosine" if learnt else "dot",
        "objective__learn_temperature": learnt,
    }
    for scope in ("utterance", "group", "batch")
    for draw, learnt in (("each", False), ("shared", False), ("shared", True))
}
ACOUSTIC = {"objective__acoustic__frames": 0.5, "objective__acoustic__window": 0.5}
POOLED = {"objective__pooled__weight": 0.2}
MIXED = {"objective__scope": "mixed", "objective__draw": "shared", "objective__learn_temperature": True}
# Sums with other objectives, from batches with measures.
SUMS = {
    "acoustic": ACOUSTIC,
    "pooled": POOLED,
    "mixed each": {"objective__scope": "mixed"},
    "all": {**ACOUSTIC, **POOLED, **MIXED},
    "all without contrast": {**ACOUSTIC, **POOLED, "objective__weight": 0},
}


def recipe(folder: Path, name: str, **overrides: Any) -> Any:
    """Two epochs, nearly, of a few long windows, whose last batch is partly padding."""
    values = {
        "window__seconds": 2.08,
        "train__steps": STEPS,
        "train__validate_every_steps": STEPS,
        "checkpoint__every_steps": STOP,
        "train__log_window_ids": folder / f"{name}.jsonl",
    }
    return speech.recipe(**{**values, **overrides})


def found(world: int, shards: Path, folder: Path) -> list[dict[str, Any]]:
    """What each of `world` ranks found."""
    if world == 1:
        _work(0, 1, shards, folder)
    else:
        # A server that has imported all of it forks the ranks: importing takes each longer than its work does.
        multiprocessing.set_forkserver_preload(["cpcscale.train.loop", "torch._dynamo"])
        mp.start_processes(_work, (world, shards, folder), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def _work(rank: int, world: int, shards: Path, folder: Path) -> None:
    if world > 1:
        meeting = f"file://{folder}/meeting-{world}"
        dist.init_process_group("gloo", meeting, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    ranks = Ranks.current(torch.device("cpu"))
    try:
        results = {
            "ranks": [ranks.rank, ranks.world, ranks.on_node],
            "split": {
                name: [_split(ranks, made, size, **keys) for size in (0, 1, 2)]
                for made, objectives in ((batches.made, OBJECTIVES), (batches.made_measured, SUMS))
                for name, keys in objectives.items()
            },
            "infinite": _infinite(ranks),
            "talk": _talk(ranks),
            "whole": _loop(ranks, shards, folder, f"whole-{world}"),
            "resumed": _loop(ranks, shards, folder, f"resumed-{world}"),
            "stopped": _stopped(ranks, shards, folder),
            "noticed": _noticed(ranks, shards, folder),
        }
        torch.save(results, folder / f"{world}-{rank}.pt")
    finally:
        if world > 1:
            dist.destroy_process_group()


def _split(ranks: Ranks, made: Callable[[slice], Batch], micro_batch: int, **keys: Any) -> dict[str, Any]:
    """One update from this rank's rows of a global batch that is the same for every number of ranks."""
    spec = speech.recipe(train__micro_batch=micro_batch, **keys)
    # Another seed on every rank but the first: only rank 0's weights may count.
    step = TrainStep(build(spec.model, ranks.rank, gain=10.0), spec, ranks, total=100)
    result = step(made(slice(ranks.rank, None, ranks.world)), 0)
    return {
        "scores": reduce_scores(result.parts, ranks),
        "count": [part.count_N.tolist() for part in result.parts],
        "samples": result.samples,
        "bad": result.bad,
        "empty": result.empty,
        "gradients": {name: parameter.grad.clone() for name, parameter in step.contrast.named_parameters()},
        "weights": {name: tensor.clone() for name, tensor in step.contrast.state_dict().items()},
    }


def _infinite(ranks: Ranks) -> dict[str, Any]:
    """Three updates; in the second the last rank's gradient is infinite."""
    spec = speech.recipe()
    step = TrainStep(build(spec.model, 0, gain=10.0), spec, ranks, total=100)
    weight, skipped, weights = step.model.predictor.maps.weight, [], []
    for t in range(3):
        broken = t == 1 and ranks.rank == ranks.world - 1
        hook = weight.register_hook(lambda gradient: gradient * math.inf) if broken else None
        step(batches.made(slice(ranks.rank, None, ranks.world), seed=t), t)
        skipped.append(step.faults() == (1, 1))
        weights.append(weight.detach().clone())
        if hook:
            hook.remove()
    return {"skipped": skipped, "weights": weights}


def _talk(ranks: Ranks) -> dict[str, Any]:
    hosts = dist.new_group(backend="gloo") if ranks.world > 1 else None
    return {"default": _said(ranks), "hosts": _said(replace(ranks, hosts=hosts))}


def _said(ranks: Ranks) -> dict[str, Any]:
    values = torch.tensor([ranks.rank, 1])
    return {
        "sum": ranks.sum(values).tolist(),
        "given": values.tolist(),
        "chosen": ranks.broadcast(f"of rank {ranks.rank}"),
        "gathered": ranks.gather({"rank": ranks.rank}),
    }


def _loop(ranks: Ranks, shards: Path, folder: Path, name: str) -> dict[str, Any]:
    watcher = speech.Watcher()
    summary = pretrain(recipe(folder, name), speech.data(shards, validate=True), str(folder / name), ranks, watcher)
    return {"summary": summary, "losses": watcher.losses, "saves": watcher.saves}


def _stopped(ranks: Ranks, shards: Path, folder: Path) -> list[Any]:
    """The words in which this rank stops, and the step it had reached, when no update is finite."""
    name, watcher = f"stopped-{ranks.world}", speech.Watcher()
    spec = recipe(folder, name, optim__learning_rate=1e30, train__nonfinite_budget=2)
    try:
        pretrain(spec, speech.data(shards), str(folder / name), ranks, watcher)
    except UserError as error:
        return [str(error), max(watcher.losses, default=0)]
    return ["did not stop", 0]


class _Asking(speech.Watcher):
    """Rank 0's observer, which asks for a checkpoint once step 2 is made and to stop once step 4 is."""

    def __init__(self, requests: RunRequests) -> None:
        super().__init__()
        self._asks = {2: requests.save, 4: requests.stop}

    def progress(self, step: int, total: int) -> None:
        self._asks.get(step, lambda: None)()


def _noticed(ranks: Ranks, shards: Path, folder: Path) -> str:
    """The words in which this rank stops when rank 0 is asked to; the others were asked for both before they began."""
    requests = RunRequests()
    if not ranks.first:
        requests.save()
        requests.stop()
    name = f"noticed-{ranks.world}"
    spec = recipe(folder, name, checkpoint__every_steps=100, checkpoint__keep=9, model__encoder__kind="logmel")
    try:
        pretrain(spec, speech.data(shards), str(folder / name), ranks, _Asking(requests), requests=requests)
    except StoppedError as stopped:
        return str(stopped)
    return "did not stop"
