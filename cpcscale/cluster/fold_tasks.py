"""Trains one fold by several processes (ranks) that share each batch, with the CCC and gradient of a single process.

A Ray task without cores reserves the resources of all ranks at once, then starts an actor for each rank and waits.
Reserving them one by one could deadlock: ranks of two folds would wait for each other. When a rank fails or dies, the
others end too; a fold of which a process died is trained again.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import Any

from cpcscale.cluster import session, tasks
from cpcscale.emotion.crossval import FoldResult, run_fold
from cpcscale.emotion.heads.training import fit_device
from cpcscale.emotion.inputs import PreparedCorpus
from cpcscale.emotion.protocol.folds import FINAL
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.machine import threads_of, usable_cores

_ATTEMPTS = 3
# How long to wait for the errors of the other ranks after one has failed: theirs may explain it.
_OTHER_ERRORS_S = 10


@dataclass(frozen=True)
class SharedFold:
    """The arguments of `run_shared`: `shared` refers to (recipe, prepared) in Ray's object store.

    Each of the `ranks` gets `cpus` cores, `threads` torch threads, and a GPU if `gpus`. `keep` and `publish` are those
    of `run_fold`.
    """

    shared: Any
    fold: int
    ranks: int
    cpus: float
    gpus: bool
    threads: int
    keep: bool = False
    publish: bool = False


def check_ranks(recipe: EmotionRecipe, ranks: int) -> None:
    """Raises UserError for a fold that `ranks` processes cannot share."""
    if ranks == 1:
        return
    of_system = recipe.definition.pretrains or recipe.regressor == "mean"
    if of_system or recipe.regressor != "attention":
        what = f"system={recipe.system}" if of_system else f"head={recipe.head}"
        raise UserError(
            f"ranks={ranks} shares the batches of a recogniser, but {what} is fitted or pretrained by one process: use "
            "ranks=1, and workers=N to run N folds at a time"
        )
    if ranks > recipe.fit.batch:
        raise UserError(
            f"ranks={ranks} are more than the utterances of a batch, fit.batch={recipe.fit.batch}: lower ranks, or "
            "raise fit.batch, which changes the loss"
        )


def check_cluster_size(recipe: EmotionRecipe, ranks: int, workers: int) -> None:
    """Raises UserError when this machine, or the cluster to run on, lacks a core (or GPU) for each rank.

    Joins that cluster, but starts no Ray on this machine.
    """
    import torch

    if ranks == 1:
        return
    cores, gpus, where = usable_cores(), torch.cuda.device_count(), "this machine"
    if session.joins_cluster():
        session.connect(workers * ranks)
        import ray

        found = ray.cluster_resources()
        cores, gpus, where = int(found.get("CPU", 0)), int(found.get("GPU", 0)), "the Ray cluster"
    if recipe.fit.device != "cpu" and 0 < gpus < ranks:
        raise UserError(
            f"ranks={ranks} needs {ranks} GPUs, one a rank, and {where} has {gpus}: lower ranks, or pass fit.device=cpu"
        )
    if ranks > cores:
        raise UserError(f"ranks={ranks} needs a core for each rank, and {where} has {cores}: lower ranks")


def connect(recipe: EmotionRecipe, ranks: int, workers: int) -> None:
    """Joins or starts Ray if the folds need it: for `ranks` that share one, for GPUs, and where it is asked for."""
    import torch

    if ranks > 1 or session.uses_ray() or (recipe.fit.device != "cpu" and torch.cuda.is_available()):
        session.connect(workers * ranks)


def uses_gpus(recipe: EmotionRecipe) -> bool:
    """Whether ranks train on GPUs: if Ray has any and fit.device is not cpu."""
    import ray

    return recipe.fit.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0


def run_shared(item: SharedFold) -> FoldResult:
    """Trains a fold by several ranks. Raises a rank's UserError, and one when processes die _ATTEMPTS times."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(_RankDiedError):
            return _attempt(item)
    raise UserError(
        f"a process of ranks={item.ranks} died {_ATTEMPTS} times in fold {item.fold}: it may have run out of memory; "
        "give the cluster more, or lower fit.micro_batch or workers, and run again"
    )


def run_folds(
    recipe: EmotionRecipe, prepared: PreparedCorpus, workers: int, ranks: int, publish: str = "none"
) -> list[FoldResult]:
    """All folds, `workers` at a time, each trained by `ranks` processes; call `connect` before.

    Unless `publish` is none, the last result is of the recogniser to publish, and with folds each has its recogniser.
    """
    numbers = list(range(len(prepared.folds.splits))) + [FINAL] * (publish != "none")
    kept = [publish == "folds" or number == FINAL for number in numbers]
    cpus = tasks.cpus_each(min(workers, len(numbers)) * ranks)
    threads, what = threads_of(cpus), f"finetune {recipe.system}"
    if ranks == 1:
        shared = (recipe, prepared, threads, publish != "none")
        items = list(zip(numbers, kept, strict=True))
        return tasks.map_tasks(_run_alone, items, what=what, unit="folds", cpus=cpus, shared=shared)
    import ray

    gpus, everywhere = uses_gpus(recipe), ray.put((recipe, prepared))
    folds = [
        SharedFold(everywhere, fold, ranks, cpus, gpus, threads, keep, publish != "none")
        for fold, keep in zip(numbers, kept, strict=True)
    ]
    return tasks.map_tasks(run_shared, folds, what=what, unit="folds", cpus=0)


def _run_alone(
    item: tuple[int, bool], recipe: EmotionRecipe, prepared: PreparedCorpus, threads: int, publish: bool
) -> FoldResult:
    import torch

    torch.set_num_threads(threads)
    fold, keep = item
    return run_fold(recipe, prepared, fold, keep=keep, publish=publish)


class _RankDiedError(Exception):
    """The process of a rank died."""


class _Rank:
    """The actor of one rank of a fold."""

    def meeting(self) -> str:
        """A free address on this node, tcp://HOST:PORT, at which the ranks can meet."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(
        self,
        shared: tuple[EmotionRecipe, PreparedCorpus],
        fold: int,
        place: tuple[int, int],
        meeting: str,
        threads: int,
        keep: bool,
        publish: bool,
    ) -> FoldResult | None:
        """The fold's result from rank 0, None from the others; `place` is (rank, world)."""
        import torch

        from cpcscale.train.ranks import join_ranks

        torch.set_num_threads(threads)
        recipe, prepared = shared
        with join_ranks(*place, meeting, fit_device(recipe.fit)) as ranks, ranks.detect_lost_peers():
            result = run_fold(recipe, prepared, fold, ranks, keep=keep and ranks.first, publish=publish)
        return result if ranks.first else None


def _attempt(item: SharedFold) -> FoldResult:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    gpus = {"GPU": 1.0} if item.gpus else {}
    room = placement_group([{"CPU": item.cpus} | gpus] * item.ranks, strategy="PACK")
    try:
        ray.get(room.ready())
        actors = [
            ray.remote(
                num_cpus=item.cpus,
                num_gpus=int(item.gpus),
                scheduling_strategy=PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=rank),
            )(_Rank).remote()
            for rank in range(item.ranks)
        ]
        meeting = actors[0].meeting.remote()
        results = [
            actor.run.remote(item.shared, item.fold, (rank, item.ranks), meeting, item.threads, item.keep, item.publish)
            for rank, actor in enumerate(actors)
        ]
        return _first_result(results)
    finally:
        # Also ends the actors, whatever they are waiting for.
        remove_placement_group(room)


def _first_result(results: list[Any]) -> FoldResult:
    """The result of rank 0 once all ranks have finished. If some failed, raises the error that explains the others."""
    import ray

    ended, waiting = list[Any](), results
    while waiting:
        now, waiting = ray.wait(waiting)
        ended += now
        if any(_failure(one) for one in now):
            late, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_OTHER_ERRORS_S) if waiting else ([], [])
            raise _root_cause([failure for one in [*ended, *late] if (failure := _failure(one))])
    return ray.get(results[0])


def _failure(reference: Any) -> Exception | None:
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return error.cause
    except ray.exceptions.RayError as error:
        return error
    return None


def _root_cause(failures: list[Exception]) -> Exception:
    """The most telling error: a UserError, else a bug, else that a process died (which other ranks only noticed)."""
    import ray

    from cpcscale.train.ranks import PeerLostError

    users = [error for error in failures if isinstance(error, UserError)]
    died = ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError | PeerLostError
    bugs = [error for error in failures if not isinstance(error, UserError | died)]
    return next(iter([*users, *bugs]), _RankDiedError())
