"""Groups of ranks for a train bench: processes on this machine that update together when a measurement is requested."""

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
# So long a rank whose pipe is closed may take to end with its error, on a machine that is busy.
_FAILURE_S = 60


def refuse_without_gpus(counts: list[int]) -> None:
    """Raises UserError for more ranks than GPUs, if there are any: two ranks on one GPU would disturb each other."""
    here = torch.cuda.device_count()
    if here and max(counts, default=0) > here:
        raise UserError(
            f"ranks={counts} needs {max(counts)} GPUs, one a rank, and there are {here}: list at most {here} ranks, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= to measure on CPUs"
        )


class RankGroup:
    """`world` ranks that share each batch. A call that waits for the ranks raises the error of one that fails."""

    def __init__(self, world: int, recipe: Recipe, index: Index, updates: int, folder: Path) -> None:
        # The sum over all ranks, known once they are ready.
        self.peak_mib = 0.0
        self._world, pairs = world, [mp.Pipe() for _ in range(world)]
        self._pipes = [mine for mine, _ in pairs]
        theirs = [other for _, other in pairs]
        arguments = theirs, recipe, index, updates, str(folder / f"meeting-{world}")
        # Daemons: they end with this process even when it is stopped while they start.
        self._context = mp.start_processes(
            _work, arguments, nprocs=world, join=False, daemon=True, start_method="spawn"
        )

    def ready(self) -> None:
        """Waits until all ranks have made their first updates."""
        self.peak_mib = sum(self._answers())

    def measure(self, place: str) -> UpdateMeasurement:
        """Measures updates on batches in memory (`place="memory"`) or from the feed (`"feed"`).

        Returns the audio of all ranks, the wall time of the slowest one and the time account of rank 0.
        """
        for pipe in self._pipes:
            # A rank that has ended is noticed when its answer is awaited.
            with contextlib.suppress(BrokenPipeError):
                pipe.send(place)
        rows: list[UpdateMeasurement] = self._answers()
        return replace(rows[0], amount=sum(row.amount for row in rows), wall_s=max(row.wall_s for row in rows))

    def end(self) -> None:
        """Ends the processes, whatever they are doing."""
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
        """The answers of all ranks, in rank order."""
        answers: dict[int, Any] = {}
        while len(answers) < self._world:
            missing = {self._pipes[rank]: rank for rank in range(self._world) if rank not in answers}
            ready, before = connection.wait([*missing, *self._context.sentinels]), len(answers)
            for pipe in missing.keys() & ready:
                # The pipe of a rank that has ended is ready too.
                with contextlib.suppress(EOFError, ConnectionResetError):
                    answers[missing[pipe]] = pipe.recv()
            for answer in answers.values():
                if isinstance(answer, UserError):
                    raise answer
            if len(answers) == before:
                self._raise_failure()
        return [answers[rank] for rank in range(self._world)]

    def _raise_failure(self) -> None:
        """Raises the error of a rank whose process has ended; UserErrors come as answers instead."""
        try:
            self._context.join(timeout=_FAILURE_S)
        except mp.ProcessExitedException as exited:
            raise UserError(
                f"one of {self._world} ranks has ended ({exited}), most likely out of memory: lower train.batch or "
                f"take {self._world} out of ranks"
            ) from None
        raise RuntimeError(f"one of {self._world} ranks has ended without an error")


@contextlib.contextmanager
def rank_groups(
    counts: list[int], recipe: Recipe, index: Index, updates: int, folder: Path
) -> Iterator[dict[int, RankGroup]]:
    """{number of ranks: group} for the block, each group ready to be measured."""
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
    # When the measuring process ends, so does this one: its pipe is closed.
    with contextlib.suppress(EOFError), join_ranks(rank, len(pipes), meeting) as ranks:
        try:
            measured = UpdateBench(recipe, index, ranks, updates)
            pipe.send(measured.peak_mib)
            while place := pipe.recv():
                pipe.send(measured.measure_memory() if place == "memory" else measured.measure_feed())
        except UserError as error:
            pipe.send(error)
            raise
