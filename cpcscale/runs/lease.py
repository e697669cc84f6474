"""One live driver a run: who may take a run, how a holder shows that it lives, and how it learns that it was overtaken.

A holder writes `RUN/ledger/alive-ID.json` anew every few seconds. Whether it lives is judged by its process where it
runs on this machine, and elsewhere by whether that file changes while we look: clocks of two machines are never
compared. A wrong judgement costs a run its driver and never a checkpoint: that only the last holder publishes follows
from the ledger alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cpcscale import config
from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.runs.ledger import RunHolder, Ledger, OvertakenError, RunState

log = logging.getLogger(__name__)

# Signs of life in the time after which a holder counts as dead.
_SIGNS = 6
_POLL_S = 0.5


class HeldError(UserError):
    """Another driver holds the run, and lives."""


@dataclass(kw_only=True)
class LeaseConfig:
    """How a run is kept to one driver."""

    # Seconds without a sign of life after which a driver on another machine counts as dead.
    ttl_s: float = 30.0

    def __post_init__(self) -> None:
        config.at_least(0.1, **{"lease.ttl_s": self.ttl_s})


def new_holder(spec: LeaseConfig) -> RunHolder:
    """A holder that is this process."""
    pid = os.getpid()
    return RunHolder(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=pid,
        machine=_machine(),
        started=_started(pid) or "",
        since_s=time.time(),
        ttl_s=spec.ttl_s,
    )


def wait_until_free(ledger: Ledger, *, take_over: bool, say: Callable[[str], None], gone: str = "") -> RunState:
    """The state of a run that may be taken. Raises HeldError when its holder lives, unless `take_over`.

    A holder whose process on this machine is gone is no holder. One on another machine is watched for as long as its
    silence may last, which `say` is told; `gone` names one that was found silent before.
    """
    while True:
        state = ledger.head()
        holder = state.holder
        if not state.held or holder is None or take_over or holder.id == gone:
            return state
        what = f"{storage.shown(ledger.run_dir)} is held by {holder.described()}"
        alive = _lives(holder)
        if alive is None:
            say(f"{what}: waiting up to {holder.ttl_s:g} s for a sign of life")
            alive = _seen_alive(ledger, holder)
        if alive:
            raise HeldError(
                f"{what}, which lives: stop it, name another run_dir, or give --take-over (pretrain) to stop it"
            )
        gone = holder.id


@contextlib.contextmanager
def hold(
    run_dir: str, spec: LeaseConfig, *, take_over: bool, say: Callable[[str], None], gone: str = ""
) -> Iterator[Lease]:
    """Takes the run for the block, as `wait_until_free` allows it.

    When another driver takes it over, the main thread is interrupted, as by Ctrl-C, and the block ends with an
    OvertakenError, as it does when whatever else went wrong in it did so after that.
    """
    ledger = Ledger(run_dir)
    lease = _taken(ledger, new_holder(spec), take_over, say, gone)
    try:
        try:
            yield lease
        except (Exception, KeyboardInterrupt):
            lease.held(now=True)
            raise
        finally:
            lease.close()
    except (Exception, KeyboardInterrupt) as error:
        if lease.lost and not isinstance(error, OvertakenError):
            raise OvertakenError(run_dir, ledger.head()) from None
        raise


class Lease:
    """A run that this process holds; `id` names it to the processes that publish in its name.

    `lost`: another driver was seen to have it.
    """

    def __init__(self, ledger: Ledger, holder: RunHolder, number: int) -> None:
        self.id = holder.id
        self._ledger, self._holder = ledger, holder
        self._seen, self._looked_s = number, time.monotonic()
        self._every_s = holder.ttl_s / _SIGNS
        self.lost, self._signs = False, 0
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._sign()
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
        self._thread.start()

    def held(self, *, now: bool = False) -> bool:
        """Whether no other driver is known to have the run; asked of the ledger `now`, or when that is a while ago.

        A ledger that does not answer is no other driver.
        """
        with self._lock, contextlib.suppress(UserError):
            if not self.lost and (now or time.monotonic() - self._looked_s > 2 * self._every_s):
                self._look()
        return not self.lost

    def close(self) -> None:
        """Gives the run back, unless another has it."""
        with self._lock:
            self._ending.set()
        self._thread.join()
        try:
            while (state := self._ledger.head()).is_of(self.id):
                released = state.released()
                if self._ledger.advance(released) and self._ledger.is_head(released):
                    self._ledger.remove_unlisted(released)
            storage.remove(_alive(self._ledger, self._holder))
        except UserError as error:
            log.warning("%s could not be given back: %s", storage.shown(self._ledger.run_dir), error)

    def _watch(self) -> None:
        while not self._ending.wait(self._every_s):
            with contextlib.suppress(UserError):
                if self.held(now=True):
                    self._sign()
                    continue
                with self._lock:
                    main = threading.main_thread().ident
                    if main and not self._ending.is_set():
                        signal.pthread_kill(main, signal.SIGINT)
                return

    def _look(self) -> None:
        if (number := self._ledger.highest()) != self._seen:
            self.lost = not self._ledger.head().is_of(self.id)
            self._seen = number
        self._looked_s = time.monotonic()

    def _sign(self) -> None:
        self._signs += 1
        storage.write(_alive(self._ledger, self._holder), json.dumps({"signs": self._signs}).encode())


def _taken(ledger: Ledger, me: RunHolder, take_over: bool, say: Callable[[str], None], gone: str) -> Lease:
    while True:
        state = wait_until_free(ledger, take_over=take_over, say=say, gone=gone).taken(me)
        if ledger.advance(state) and ledger.is_head(state):
            for name in storage.list_files(ledger.folder):
                if name.startswith("alive-"):
                    storage.remove(storage.join(ledger.folder, name))
            return Lease(ledger, me, state.number)
        # A second one that took it in the same moment is a holder like any other.


def _seen_alive(ledger: Ledger, holder: RunHolder) -> bool:
    """Whether the holder gives a sign of life within its time; at once False when it has given the run back."""
    deadline = time.monotonic() + holder.ttl_s
    before = _last_sign(ledger, holder)
    while time.monotonic() < deadline:
        time.sleep(min(_POLL_S, holder.ttl_s / _SIGNS))
        if not ledger.head().is_of(holder.id):
            return False
        if _last_sign(ledger, holder) != before:
            return True
    return False


def _last_sign(ledger: Ledger, holder: RunHolder) -> bytes:
    try:
        return storage.read(_alive(ledger, holder))
    except storage.NotFoundError:
        return b""


def _alive(ledger: Ledger, holder: RunHolder) -> str:
    return storage.join(ledger.folder, f"alive-{holder.id}.json")


def _lives(holder: RunHolder) -> bool | None:
    """Whether the holder's process lives; None when it runs where this process cannot see it."""
    if not holder.machine or holder.machine != _machine():
        return None
    return _started(holder.pid) == holder.started


def _machine() -> str:
    """This boot of this machine and its process numbers; empty where the system does not tell (not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a living process of this machine began, in ticks since boot; None for one that is gone."""
    try:
        # The name before it may hold anything, the last bracket ends it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
