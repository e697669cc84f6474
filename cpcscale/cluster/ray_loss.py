"""Ray's own death under a verb: one line and the right status, where Ray would end the process or wait for minutes.

Ray's driver cannot go on without its GCS and the raylet of its node. A thread watches them. When one is gone, the main
thread is interrupted; if it is stuck inside Ray, whose C++ may wait and then exit without Python, the thread ends the
process itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cpcscale.errors import UserError
from cpcscale.signals import handlers_restored

_POLL_S = 0.5
# Ray exits 60 s after it lost its GCS. How long the main thread has to end by itself; and, for a head elsewhere, which
# may be started again, how long it may be silent.
_ENDS_WITHIN_S = 10.0
_SILENT_S = 40.0


class RayLostError(UserError):
    """A process of Ray died that this one cannot work without."""


class _Loss:
    """What died, empty while all live; what to say and do at that, innermost last."""

    def __init__(self) -> None:
        self.what = ""
        self.way_out = ""
        self.ends: list[Callable[[], None]] = []


_loss = _Loss()


def watch() -> None:
    """Watches the processes of the Ray that this process has started or joined; call it once Ray is initialised."""
    _loss.what = ""
    threading.Thread(target=_watch, args=(_own_ray(),), name="ray-watch", daemon=True).start()


@contextlib.contextmanager
def guarded(way_out: str = "", end: Callable[[], None] | None = None) -> Iterator[None]:
    """Raises RayLostError for any error in the block that follows from a death in Ray.

    With `way_out` the block is a whole verb: if Ray is lost and the block does not end soon, the process prints one
    line with it and exits with status 2. Before that it calls the `end` of each block that it is in.
    """
    before = _loss.way_out
    _loss.way_out = way_out or before
    _loss.ends += [end] if end else []
    try:
        # Not one that a user or SLURM sends. Its default is to be ignored.
        with handlers_restored(signal.SIGURG, meanwhile=_raise_loss):
            yield
    except (Exception, KeyboardInterrupt) as error:
        if what := _loss.what or _died(error):
            raise RayLostError(_line(what)) from None
        raise
    finally:
        _loss.way_out = before
        if way_out and not before:
            _loss.what = ""
        if end:
            _loss.ends.remove(end)


def lost() -> bool:
    """Whether Ray has died, so that a call to it may never return."""
    return bool(_loss.what)


def _line(what: str) -> str:
    return f"{what} died under this command, maybe for lack of memory{_loss.way_out and '; '}{_loss.way_out}"


def _raise_loss(*_: object) -> None:
    raise RayLostError(_line(_loss.what))


def _died(error: BaseException) -> str:
    """What of Ray died, if that is why an error was raised; empty otherwise."""
    if "ray" not in sys.modules:
        return ""
    from ray import exceptions as ray

    deaths = (
        *(ray.RayActorError, ray.WorkerCrashedError, ray.OutOfMemoryError, ray.ObjectLostError),
        *(ray.NodeDiedError, ray.LocalRayletDiedError, ray.RaySystemError, ray.RpcError),
    )
    causes = (error, error.__cause__, *(getattr(error, name, None) for name in ("cause", "controller_failure")))
    dead = [each for each in causes if isinstance(each, deaths) and not isinstance(each, ray.RayTaskError)]
    return f"a process of Ray ({type(dead[0]).__name__})" if dead else ""


def _own_ray() -> dict[str, Callable[[], bool]]:
    """Whether each process that this one cannot do without has died, by its name.

    They are the GCS and the raylet of a Ray that it has started; of a cluster that it has joined, the raylet of its
    node and the head, which counts as dead once it has not answered for long.
    """
    import psutil
    import ray

    # The newest: those of a start that failed may still be there.
    own = {each.name(): each for each in psutil.Process().children() if each.name() in ("gcs_server", "raylet")}
    if own:
        return {f"Ray's {name}": partial(_gone, process) for name, process in own.items()}
    head = ray.get_runtime_context().gcs_address
    here = [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "raylet" and f"--gcs-address={head}" in (process.info["cmdline"] or ())
    ]
    # Of several on one machine nobody can say which is ours.
    raylet = {"Ray's raylet on this node": partial(_gone, here[0])} if len(here) == 1 else {}
    return raylet | {f"the head of the Ray cluster at {head}": _silence(head)}


def _watch(watched: dict[str, Callable[[], bool]]) -> None:
    import psutil
    import ray

    while not (dead := [name for name, gone in watched.items() if gone()]):
        time.sleep(_POLL_S)
        if not ray.is_initialized():
            return
    # Asked last: a shutdown ends them too.
    if not ray.is_initialized():
        return
    _loss.what = dead[0]
    main = threading.main_thread().ident
    if main and signal.getsignal(signal.SIGURG) is _raise_loss:
        signal.pthread_kill(main, signal.SIGURG)
    if not _loss.way_out:
        return
    line = _line(_loss.what)
    time.sleep(_ENDS_WITHIN_S)
    if not (stuck := bool(_loss.way_out)):
        # The verb has ended by itself, and only Ray's own end, at that of the process, may be stuck.
        threading.main_thread().join()
        time.sleep(_ENDS_WITHIN_S)
    try:
        for end in reversed(_loss.ends):
            end()
        if stuck:
            os.write(2, f"cpcscale: error: {line}\n".encode())
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
    finally:
        os._exit(2)


def _gone(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def _silence(address: str) -> Callable[[], bool]:
    """A function that says whether nothing has answered at HOST:PORT for _SILENT_S."""
    host, _, port = address.rpartition(":")
    heard_s = time.monotonic()

    def silent() -> bool:
        nonlocal heard_s
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            heard_s = time.monotonic()
        return time.monotonic() - heard_s > _SILENT_S

    return silent
