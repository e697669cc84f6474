"""Runs a function over many items side by side: in processes of this machine, or as Ray tasks where Ray is asked for.

Processes are loky's, which need nothing of the program that calls: a script without a main guard and a notebook will
do. Results, errors and the answer to a stop are the same both ways.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cpcscale import freed_memory
from cpcscale.cluster import session
from cpcscale.cluster.ray_tasks import RayPool, RayTasks, process_died
from cpcscale.errors import UserError
from cpcscale.machine import usable_cores
from cpcscale.progress import Progress
from cpcscale.signals import ENDING

# How often a process looks whether the one that started it still lives.
_PARENT_EVERY_S = 0.5
# How long a process without a task waits for the next one: to start it and import torch takes seconds.
_IDLE_S = 10


class _Executor(Protocol):
    """Where tasks run, `width` of them at a time."""

    width: int

    def submit(self, item: Any) -> Any:
        """A reference to the task of this item."""

    def wait(self, references: set[Any]) -> Sequence[Any] | set[Any]:
        """Those that are done, at least one."""

    def result(self, reference: Any) -> Any:
        """The result of a task that is done. Raises its error; UserError when its process died."""

    def close(self, unfinished: set[Any], *, interrupted: bool) -> None:
        """Ends the tasks that nobody waits for any more; `interrupted`: this process ends, too."""


def map_tasks(
    function: Callable[..., Any], items: Sequence[Any], *, what: str, unit: str = "tasks", **options: Any
) -> list[Any]:
    """The results of `stream_tasks` as a list."""
    return list(stream_tasks(function, items, what=what, unit=unit, **options))


def stream_tasks(
    function: Callable[..., Any],
    items: Sequence[Any],
    *,
    what: str,
    unit: str = "tasks",
    cpus: float = 1,
    gpus: float = 0,
    most_processes: int = 0,
    shared: tuple[Any, ...] = (),
) -> Iterator[Any]:
    """Yields `function(item, *shared)` of every item in order, each with `cpus` cores.

    With `gpus` (of `gpus_each`), in at most `most_processes` processes of Ray that hold so many each. `shared` is sent
    to each process or node once. Only a few tasks for each core are submitted at a time; those that have not ended when
    the caller stops early are cancelled. A task's UserError is raised as it is.
    """
    run: _Executor
    if gpus:
        run = RayPool(function, shared, cpus, gpus, min(len(items), most_processes or len(items)))
    elif session.uses_ray():
        run = RayTasks(function, shared, cpus)
    else:
        run = _LocalTasks(function, shared, cpus, len(items))
    most = max(8, 4 * run.width)
    pending: deque[Any] = deque()
    unfinished: set[Any] = set()
    submitted, interrupted = 0, False
    with Progress(what, len(items), unit) as progress:
        try:
            for _ in range(len(items)):
                while len(pending) < most and submitted < len(items):
                    pending.append(run.submit(items[submitted]))
                    unfinished.add(pending[-1])
                    submitted += 1
                # Results are yielded in order, but progress counts a task as soon as it is done.
                while pending[0] in unfinished:
                    unfinished.difference_update(run.wait(unfinished))
                    progress.update(submitted - len(unfinished))
                yield run.result(pending.popleft())
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            run.close(unfinished, interrupted=interrupted)


def cpus_each(workers: int) -> float:
    """The cores for each task so that `workers` tasks run at a time; never more than the largest node has."""
    if session.uses_ray():
        session.connect(workers)
        cores = [node.get("CPU", 0.0) for node in session.live_nodes()]
    else:
        cores = [float(usable_cores())]
    share = min(sum(cores) / workers, max(cores, default=1.0))
    return float(int(share)) if share >= 1 else share


def gpus_each(workers: int) -> float:
    """The GPUs for each task so that `workers` tasks run at a time, one or a share of one; joins or starts Ray.

    Raises UserError where that has no GPU.
    """
    session.connect(workers)
    have = sum(node.get("GPU", 0.0) for node in session.live_nodes())
    if not have:
        raise UserError("device=cuda, and Ray has no GPU: use the CPU, or add a node with a GPU")
    # Ray counts in 10,000ths.
    return 10_000 // math.ceil(max(workers, 1) / have) / 10_000


class _LocalTasks:
    """Tasks in processes of this machine, which start with the first task and wait a while for the next call's."""

    def __init__(self, function: Callable[..., Any], shared: tuple[Any, ...], cpus: float, count: int) -> None:
        from loky import get_reusable_executor

        # loky replaces a process whose memory has grown, between two tasks, and warns of it.
        replaced = "A worker (stopped|was restarted) while some jobs"
        warnings.filterwarnings("ignore", message=replaced, category=UserWarning)
        self.width = max(1, min(count, round(usable_cores() / cpus)))
        self._function, self._shared, self._call = function, shared, uuid.uuid4().hex
        threads = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
        with _starting():
            # The processes of the call before, if this one would start the same: of this environment, in this folder.
            self._pool = get_reusable_executor(
                max_workers=self.width,
                timeout=_IDLE_S,
                kill_workers=True,
                initializer=_begin,
                initargs=(os.getpid(), Path.cwd(), tuple(sys.path)),
                env=threads | dict(os.environ) | freed_memory.environment(),
            )

    def submit(self, item: Any) -> Future[Any]:
        reference: Future[Any] = Future()
        with _starting():
            self._send(reference, item, None if self._shared else ())
        return reference

    def _send(self, reference: Future[Any], item: Any, shared: tuple[Any, ...] | None) -> None:
        try:
            task = self._pool.submit(_run, self._call, shared, self._function, item)
        except BrokenProcessPool as error:
            reference.set_exception(error)
        else:
            task.add_done_callback(partial(self._receive, reference, item))

    def _receive(self, reference: Future[Any], item: Any, task: Future[Any]) -> None:
        """Passes on how a task ended; one whose process lacks what this call shares is sent again, with that."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, _LacksShared):
            self._send(reference, item, self._shared)
        elif error is not None:
            reference.set_exception(error)
        elif not task.cancelled():
            reference.set_result(task.result())

    def wait(self, references: set[Future[Any]]) -> set[Future[Any]]:
        return wait(references, return_when=FIRST_COMPLETED).done

    def result(self, reference: Future[Any]) -> Any:
        try:
            return reference.result()
        except UserError as error:
            raise error from None
        except BrokenProcessPool as error:
            raise process_died(_exit_codes(error)) from None

    def close(self, unfinished: set[Future[Any]], *, interrupted: bool) -> None:
        if interrupted or unfinished:
            self._pool.shutdown(kill_workers=True)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """For the block, in which processes may start.

    They inherit what is blocked: a Ctrl-C or another signal to the whole group is answered by this process alone, which
    then ends them. And they do not look for Python's own modules in the current folder, which may have a `queue.py`.
    """
    mask, safe = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *ENDING}), os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ.pop("PYTHONSAFEPATH") if safe is None else os.environ.update(PYTHONSAFEPATH=safe)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _LacksShared(Exception):
    """The process of a task has not got what the tasks of its call share."""


# In a process for tasks: the call that its last task was of, and what the tasks of that call share.
_known: tuple[str, tuple[Any, ...]] = "", ()


def _begin(parent: int, *_: Any) -> None:
    """Prepares a process for tasks: it prints nothing, as what goes wrong is raised, and ends with its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_EVERY_S)
        os._exit(1)

    with Path(os.devnull).open("w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    threading.Thread(target=watch, name="parent", daemon=True).start()


def _run(call: str, shared: tuple[Any, ...] | None, function: Callable[..., Any], item: Any) -> Any:
    global _known
    if shared is not None:
        _known = call, shared
    if _known[0] != call:
        raise _LacksShared
    return function(item, *_known[1])


def _exit_codes(error: BrokenProcessPool) -> str:
    return f"exit status {str(error).partition('{')[2].partition('}')[0] or 'unknown'}"
