"""Ray's own death under a verb: one line and the right status, where Ray would end the process or wait for minutes.

Ray's driver cannot go on without its GCS and the raylet of its node. A thread watches them. When one is gone, the main
thread is interrupted; if it is stuck inside Ray, whose C++ may wait and then exit without Python, the thread ends the
process itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cpcscale.errors import UserError
from cpcscale.signals import handlers_restored

_POLL_S = 0.5
# How long the main thread has to end by itself; Ray would exit 60 s after it lost its GCS.
_ENDS_WITHIN_S = 10.0
_NAMES = ("gcs_server", "raylet")


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
    if watched := {each.name(): each for each in _own_ray()}:
        threading.Thread(target=_watch, args=(watched,), name="ray-watch", daemon=True).start()


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
        with handlers_restored(signal.SIGUSR1, meanwhile=_raise_loss):
            yield
    except (Exception, KeyboardInterrupt) as error:
        if what := _loss.what or _died(error):
            raise RayLostError(_line(what)) from None
        raise
    finally:
        _loss.way_out = before
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
    from ray.exceptions import RayError, RayTaskError

    causes = (error, error.__cause__, *(getattr(error, name, None) for name in ("cause", "controller_failure")))
    dead = [each for each in causes if isinstance(each, RayError) and not isinstance(each, RayTaskError)]
    return f"a process of Ray ({type(dead[0]).__name__})" if dead else ""


def _own_ray() -> list[Any]:
    """The GCS and the raylet that this process has started; the raylet of its node if it has joined a cluster."""
    import psutil
    import ray

    children = psutil.Process().children()
    found = [[each for each in children if each.name() == name] for name in _NAMES]
    if any(found):
        # The newest: those of a start that failed may still be there.
        return [each[-1] for each in found if each]
    address = f"--gcs-address={ray.get_runtime_context().gcs_address}"
    here = [each for each in psutil.process_iter(["name", "cmdline"]) if each.info["name"] == _NAMES[1]]
    here = [each for each in here if address in (each.info["cmdline"] or ())]
    # Of several on one machine nobody can say which is ours.
    return here if len(here) == 1 else []


def _watch(watched: dict[str, Any]) -> None:
    import psutil
    import ray

    while not (dead := [name for name, process in watched.items() if _gone(process)]):
        time.sleep(_POLL_S)
    # Asked last: a shutdown ends them too.
    if not ray.is_initialized():
        return
    _loss.what = f"Ray's {dead[0]}"
    main = threading.main_thread().ident
    if main and (_loss.way_out or _loss.ends):
        signal.pthread_kill(main, signal.SIGUSR1)
    if not _loss.way_out:
        return
    line = _line(_loss.what)
    time.sleep(_ENDS_WITHIN_S)
    stuck = bool(_loss.way_out)
    for end in reversed(_loss.ends):
        end()
    if stuck:
        with contextlib.suppress(OSError):
            os.write(2, f"cpcscale: error: {line}\n".encode())
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(2)


def _gone(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return True
