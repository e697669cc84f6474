"""Joining or starting Ray, and mapping a function over items as Ray tasks."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpcscale import freed_memory
from cpcscale.errors import Terminated, UserError
from cpcscale.progress import Progress

_OBJECT_STORE_BYTES = 256 * 2**20
# JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S
_RAY_STOP_WAIT_S = 3


def connect(workers: int = 1, *, here: bool = False) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts a small Ray on this machine alone; once a process.

    With `here` it starts one whatever RAY_ADDRESS names.

    A Ray of our own binds to loopback, needs no token and says nothing of its own; it ends with this process. It has
    room for `workers` even on fewer cores. Raises UserError when the cluster does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    with _sigterm_kept():
        _connect(workers, "" if here else os.environ.get("RAY_ADDRESS", ""))


def joins_cluster() -> bool:
    """Whether `connect` joins a cluster, which others may join too, by RAY_ADDRESS."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def connected(workers: int, *, here: bool = False) -> Iterator[None]:
    """`connect` for the block. What Ray prints meanwhile is lost: pages of its logs when a node is, on stdout."""
    import ray

    joining = not ray.is_initialized()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            connect(workers, here=here)
            yield
        finally:
            if joining:
                ray.shutdown()


def _connect(workers: int, address: str) -> None:
    import ray

    # How often Ray Train looks whether workers live, and whether a node is to be taken away.
    for name in ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"):
        os.environ.setdefault(name, "0.5")
    # How long it waits for room on a node that may be gone by now; it asks again for as long as it takes.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    if address:
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": freed_memory.environment()},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}): start one with "
                "`ray start --head`, or unset RAY_ADDRESS to run on this machine alone"
            ) from None
        return
    # Set before Ray starts its processes, and never over a user's own choice. A Ray that only this process can reach
    # needs no token; asking for one would write into the user's home.
    for name, value in (
        ("RAY_AUTH_MODE", "disabled"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        *freed_memory.environment().items(),
    ):
        os.environ.setdefault(name, value)
    ray.init(
        address="local",
        num_cpus=max(workers, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def stop_wait_s() -> float:
    """How long Ray waits for this process to end, once it was asked to: a job that `ray job stop` stops is killed then.

    Infinite for a process that is no job's. Raises UserError when the environment says no number.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return math.inf
    name = "RAY_JOB_STOP_WAIT_TIME_S"
    value = os.environ.get(name, str(_RAY_STOP_WAIT_S))
    if not value.isdecimal():
        raise UserError(f"{name}={value} is no whole number of seconds, and Ray could not stop the job: write 60")
    return int(value)


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray ends a process at SIGTERM in its own way; what was to happen then before happens after the block too."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise Terminated from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def live_nodes() -> list[dict[str, float]]:
    """The resources of each live node of the Ray that is joined, as Ray names them: CPU, GPU, ..."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def cpus_each(workers: int) -> float:
    """The cores that each of `workers` tasks gets so that this many run at a time; never more than one node has."""
    cores = [node.get("CPU", 0.0) for node in live_nodes()]
    share = min(sum(cores) / workers, max(cores, default=1.0))
    return float(int(share)) if share >= 1 else share


def map_tasks(
    function: Callable[..., Any], items: Sequence[Any], *, what: str, unit: str = "tasks", **options: Any
) -> list[Any]:
    """The results of `stream_tasks`, all at once."""
    return list(stream_tasks(function, items, what=what, unit=unit, **options))


def stream_tasks(
    function: Callable[..., Any],
    items: Sequence[Any],
    *,
    what: str,
    unit: str = "tasks",
    cpus: float = 1,
    shared: tuple[Any, ...] = (),
) -> Iterator[Any]:
    """`function(item, *shared)` of every item, in order, each as a Ray task of `cpus`; `shared` is sent to a node once.

    Items are asked for, and results held, a few for each core at a time; what is under way is cancelled when the caller
    stops early. A task's UserError is raised as it is.
    """
    import ray

    everywhere = ray.put(shared)

    def call(item: Any) -> Any:
        return function(item, *ray.get(everywhere))

    remote = ray.remote(num_cpus=cpus)(call if shared else function)
    most = max(8, 4 * int(ray.cluster_resources().get("CPU", 1)))
    coming: deque[Any] = deque()
    working: set[Any] = set()
    asked = 0
    with Progress(what, len(items), unit) as progress:
        try:
            for _ in range(len(items)):
                while len(coming) < most and asked < len(items):
                    coming.append(remote.remote(items[asked]))
                    working.add(coming[-1])
                    asked += 1
                # Results come in order, but what is done counts when it is done.
                while coming[0] in working:
                    ready, _ = ray.wait(list(working), num_returns=1)
                    working.difference_update(ready)
                    progress.at(asked - len(working))
                yield _result(coming.popleft())
        except KeyboardInterrupt:
            # This process ends, and Ray its tasks with it. Ray 2.60 aborts a process that hears from a cancelled one.
            working.clear()
            raise
        finally:
            for reference in working:
                ray.cancel(reference)


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise UserError(
            f"a worker process died more than once at the same task ({str(error).splitlines()[0]}): it may have "
            "run out of memory; give the cluster more, or fewer tasks at a time (num_cpus), and run again"
        ) from None
