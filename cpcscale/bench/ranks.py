"""Several ranks that update together, each a process of this machine that does nothing until it is asked to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from cpcscale import freed_memory
from cpcscale.bench.updates import UpdateBench, UpdateMeasurement
from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.train.ranks import join_ranks
from cpcscale.train.recipe import Recipe

_END_S = 5.0


def refuse_without_gpus(counts: list[int]) -> None:
    """Refuses more ranks than there are GPUs, where there are any: two ranks on one measure neither."""
    here = torch.cuda.device_count()
    if here and max(counts, default=0) > here:
        raise UserError(
            f"ranks={counts} needs {max(counts)} GPUs, one a rank, and there are {here}: list at most {here} ranks, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= to measure on CPUs"
        )


class RankGroup:
    """`world` ranks that share each batch; what one of them fails of ends the call that is waiting for it."""

    def __init__(self, world: int, recipe: Recipe, index: Index, updates: int, folder: Path) -> None:
        # Of all ranks, once they are ready.
        self.peak_mib = 0.0
        self._world, pairs = world, [mp.Pipe() for _ in range(world)]
        self._pipes = [mine for mine, _ in pairs]
        theirs = [other for _, other in pairs]
        arguments = theirs, recipe, index, updates, str(folder / f"meeting-{world}")
        # Daemons, which do not outlive this process even when it is stopped while they start.
        self._context = mp.start_processes(
            _work, arguments, nprocs=world, join=False, daemon=True, start_method="spawn"
        )

    def ready(self) -> None:
        """Waits for the first updates to be over."""
        self.peak_mib = sum(self._answers())

    def measure(self, place: str) -> UpdateMeasurement:
        """The audio of all ranks over the slowest one's wall time, with the account of rank 0; `place` is `memory`, for
        updates on batches in memory, or `feed`."""
        for pipe in self._pipes:
            # One that has ended is found where its answer is waited for.
            with contextlib.suppress(BrokenPipeError):
                pipe.send(place)
        rows: list[UpdateMeasurement] = self._answers()
        return replace(rows[0], amount=sum(row.amount for row in rows), wall_s=max(row.wall_s for row in rows))

    def end(self) -> None:
        """Ends the processes, whatever they do."""
        for process in self._context.processes:
            process.terminate()
        for process in self._context.processes:
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
        for path in self._context.error_files:
            Path(path).unlink(missing_ok=True)

    def _answers(self) -> list[Any]:
        """What every rank answers, in rank order."""
        answers: dict[int, Any] = {}
        while len(answers) < self._world:
            missing = {self._pipes[rank]: rank for rank in range(self._world) if rank not in answers}
            ready, before = connection.wait([*missing, *self._context.sentinels]), len(answers)
            for pipe in missing.keys() & ready:
                # Of one that has ended a pipe is ready too.
                with contextlib.suppress(EOFError, ConnectionResetError):
                    answers[missing[pipe]] = pipe.recv()
            for answer in answers.values():
                if isinstance(answer, UserError):
                    raise answer
            if len(answers) == before:
                self._refuse_the_dead()
        return [answers[rank] for rank in range(self._world)]

    def _refuse_the_dead(self) -> None:
        """Raises what a rank has failed of, which is no UserError: those come as answers."""
        try:
            self._context.join(timeout=_END_S)
        except mp.ProcessExitedException as exited:
            raise UserError(
                f"one of {self._world} ranks has ended ({exited}), most likely for want of memory: lower train.batch "
                "or leave these ranks out"
            ) from None
        raise RuntimeError(f"one of {self._world} ranks has ended before its time")


@contextlib.contextmanager
def rank_groups(
    counts: list[int], recipe: Recipe, index: Index, updates: int, folder: Path
) -> Iterator[dict[int, RankGroup]]:
    """Within the block there are groups of these numbers of ranks, ready to be measured."""
    running: dict[int, RankGroup] = {}
    try:
        for world in dict.fromkeys(counts):
            running[world] = RankGroup(world, recipe, index, updates, folder)
        for group in running.values():
            group.ready()
        yield running
    finally:
        for group in running.values():
            group.end()


def _work(rank: int, pipes: list[Any], recipe: Recipe, index: Index, updates: int, meeting: str) -> None:
    freed_memory.keep_freed_memory()
    pipe = pipes[rank]
    # The end of the process that asks is the end of this one.
    with contextlib.suppress(EOFError), join_ranks(rank, len(pipes), meeting) as ranks:
        try:
            measured = UpdateBench(recipe, index, ranks, updates)
            pipe.send(measured.peak_mib)
            while place := pipe.recv():
                pipe.send(measured.measure_memory() if place == "memory" else measured.measure_feed())
        except UserError as error:
            pipe.send(error)
            raise
