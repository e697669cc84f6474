"""Joining or starting Ray."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import math
import os
import platform
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpcscale import freed_memory
from cpcscale.cluster import ray_loss
from cpcscale.errors import Terminated, UserError
from cpcscale.machine import usable_cores
from cpcscale.signals import ENDING, handlers_restored

# The RAY_ADDRESS of a Ray that is to be started on this machine.
_HERE = "local"
_OBJECT_STORE_BYTES = 256 * 2**20
# JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S
_RAY_STOP_WAIT_S = 3
# How often a local Ray is started before giving up; each start waits for its node for 30 s, or for so long while the
# process of the node lives.
_STARTS = 3
_START_WAIT_S = 600.0
# A socket's path has at most 107 bytes, of which Ray needs about 65 below its folder.
_LONGEST_FOLDER = 40
# A head that restarts is back by then.
_ANSWERS_WITHIN_S = 10.0

log = logging.getLogger(__name__)


def connect(workers: int = 1, *, here: bool = False) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts a small local Ray; does nothing when Ray is initialised.

    With `here`, or RAY_ADDRESS=local, it starts a local Ray in any case. A local Ray binds to loopback, needs no token,
    prints nothing and ends with this process. It has room for `workers` even on fewer cores. Raises UserError when the
    cluster does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    with _signals_kept():
        _connect(workers, "" if here or not joins_cluster() else os.environ["RAY_ADDRESS"])
    ray_loss.watch()


def joins_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster that `connect` joins, and other nodes and drivers may join too."""
    return os.environ.get("RAY_ADDRESS") not in (None, "", _HERE)


def uses_ray() -> bool:
    """Whether work that can do without Ray runs on it: where RAY_ADDRESS is set, and where this process has it."""
    # Ray is slow to import, and not initialised where it is not imported.
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())


@contextlib.contextmanager
def connected(workers: int, *, here: bool = False) -> Iterator[None]:
    """`connect` for the block. Stdout is dropped meanwhile: Ray prints pages of logs to it when a node is lost."""
    import ray

    joining = not ray.is_initialized()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            connect(workers, here=here)
            yield
        finally:
            if joining:
                ray.shutdown()


def _refuse_without_loopback() -> None:
    """Raises UserError where this machine cannot connect to itself: Ray would try for many minutes."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"this machine cannot connect to itself at 127.0.0.1 ({error.strerror or error}), as Ray's processes have "
            "to: bring its loopback device up (as root: ip link set lo up)"
        ) from None


def _connect(workers: int, address: str) -> None:
    import ray

    # How often Ray Train checks whether workers are alive, and whether a node will be taken away.
    for name in ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"):
        os.environ.setdefault(name, "0.5")
    # How long one attempt to place workers waits, maybe for a node that is gone by now; it tries again without limit.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    # What cpcscale rests on; a cluster's image may say otherwise. Under `uv run`, Ray would upload the current folder.
    os.environ |= {"RAY_TRAIN_V2_ENABLED": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    if address:
        _refuse_silent(address)
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": freed_memory.environment()},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_cluster(address, str(error).splitlines()[0]) from None
        return
    # Set before Ray starts its processes, without overriding the user. A Ray that only this process can reach needs no
    # token, and making one would write into the user's home.
    for name, value in (
        ("RAY_AUTH_MODE", "disabled"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        # Ray's workers have the lowest priority but one, and come to nothing beside other work of the machine.
        ("RAY_worker_niceness", "0"),
        # A busy machine takes minutes to start a process of Python; the worker would be started over and over.
        ("RAY_worker_register_timeout_seconds", "600"),
        ("RAY_agent_register_timeout_ms", "600000"),
        *freed_memory.environment().items(),
    ):
        os.environ.setdefault(name, value)
    _refuse_without_loopback()
    with _in_folder(_ray_folder()) as folder, _patience():
        for left in reversed(range(_STARTS)):
            try:
                ray.init(
                    address="local",
                    num_cpus=max(workers, usable_cores()),
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                )
                return
            except Exception as error:  # noqa: BLE001 (Ray raises a bare Exception where its node does not come up)
                ray.shutdown()
                if not left:
                    why = " ".join(str(error).split())[:200]
                    raise UserError(
                        f"Ray did not start on this machine, {_STARTS} times tried ({why}): see "
                        f"{folder}/session_latest/logs; a machine that is this busy, or has no memory left, may need "
                        "fewer processes"
                    ) from None
                log.warning("Ray did not start (is the machine very busy?): trying again")


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Within the block a node that starts here has _START_WAIT_S to appear: a busy machine needs more than Ray's 30 s.

    Ray has no setting for it. Its question for the node is a private function, which is left alone where it is missing.
    """
    import psutil
    from ray._private import services

    def is_living_raylet(process: psutil.Process) -> bool:
        try:
            return process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    ask = getattr(services, "get_node", None)
    if ask is None:
        yield
        return

    def ask_patiently(*arguments: Any) -> Any:
        until = time.monotonic() + _START_WAIT_S
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:
                # The node is not there yet.
                if time.monotonic() > until or not any(map(is_living_raylet, psutil.Process().children())):
                    raise
                time.sleep(0.1)

    services.get_node = ask_patiently
    try:
        yield
    finally:
        services.get_node = ask


def _ray_folder() -> str:
    """A folder for the files of a local Ray, whose sockets need a short path: not TMPDIR, which may be any path."""
    for parent in filter(None, (os.environ.get("RAY_TMPDIR"), "/tmp", "/dev/shm", tempfile.gettempdir())):
        folder = Path(parent, f"ray-{os.getuid()}")
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if len(str(folder)) <= _LONGEST_FOLDER and os.access(folder, os.W_OK):
                return str(folder)
    raise UserError("Ray needs a folder for its sockets: make /tmp writable, or set RAY_TMPDIR to a short path")


@contextlib.contextmanager
def _in_folder(folder: str) -> Iterator[str]:
    """Changes to the folder for the block, and yields it.

    Ray's workers search the folder in which Ray was started for modules: a `queue.py` there would replace Python's.
    """
    # O_PATH needs no right to read the folder.
    before = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))
    try:
        os.chdir(folder)
        yield folder
    finally:
        os.fchdir(before)
        os.close(before)


def _refuse_silent(address: str) -> None:
    """Raises UserError for an address that is none of a cluster's, or where nothing answers: Ray waits for minutes."""
    scheme, found, _ = address.partition("://")
    if found:
        raise UserError(
            f"RAY_ADDRESS={address} is an address for `ray {'job submit' if scheme.startswith('http') else 'client'}`, "
            "not of a cluster to join: unset RAY_ADDRESS to run on this machine, give the head's HOST:6379, or submit "
            "with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    until = time.monotonic() + _ANSWERS_WITHIN_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, UnicodeError) as error:
            # A name that is no host's is a UnicodeError.
            if time.monotonic() > until or isinstance(error, socket.gaierror | UnicodeError):
                raise _no_cluster(address, getattr(error, "strerror", None) or str(error)) from None
            time.sleep(0.5)


def _no_cluster(address: str, why: str) -> UserError:
    return UserError(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({why}): start one with `ray start --head`, or unset "
        "RAY_ADDRESS to run on this machine alone"
    )


def stop_wait_s() -> float:
    """Seconds between `ray job stop` and the kill, if this process is a Ray job; infinite if it is not.

    Raises UserError when RAY_JOB_STOP_WAIT_TIME_S is not a whole number.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return math.inf
    name = "RAY_JOB_STOP_WAIT_TIME_S"
    value = os.environ.get(name, str(_RAY_STOP_WAIT_S))
    if not value.isdecimal():
        raise UserError(
            f"{name}={value} is not a whole number, so Ray could not stop the job: write seconds, such as 60"
        )
    return int(value)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Restores the SIGTERM handler after the block: Ray installs its own. A SIGTERM in the block raises Terminated.

    Processes that are started in the block never get the others of ENDING, which a closed terminal and SLURM send to
    all of a command: the driver alone answers them, with workers that can still make a checkpoint.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING} - {signal.SIGTERM})
    try:
        with handlers_restored(signal.SIGTERM):
            yield
    except SystemExit:
        raise Terminated from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def live_nodes() -> list[dict[str, float]]:
    """The resources of each live node of the connected Ray, by Ray's names: CPU, GPU, ..."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def versions() -> dict[str, str]:
    """The versions that a driver and the nodes of its cluster must share, by package."""
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in ("cpcscale", "torch", "ray")}
    return {"Python": platform.python_version().rpartition(".")[0], **found}


@functools.cache
def refuse_other_versions(*driver: tuple[str, str]) -> None:
    """Raises UserError on a node whose versions are not these, the items of the driver's `versions()`."""
    here = versions()
    if other := [f"{name} {here[name]} and not {version}" for name, version in driver if here[name] != version]:
        raise UserError(
            f"node {socket.gethostname()} has {', '.join(other)}, which this job runs with: install the same versions "
            f"on every node (its Python is {sys.executable})"
        )
