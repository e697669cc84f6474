"""The lease of a run: at most one live driver works on a run, and it notices when another one takes the run over.

The driver that holds a run rewrites `RUN/ledger/alive-ID.json` every few seconds. A driver on this machine is alive
when its process is; a driver elsewhere is alive when that file changes while we watch it. Clocks of two machines are
never compared. A wrong judgement can stop a driver but never damages a checkpoint: the ledger alone ensures that only
the last holder publishes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.machine import ProcessMark
from cpcscale.runs.ledger import Ledger, OvertakenError, RunHolder, RunState

log = logging.getLogger(__name__)

# How many signs of life a holder writes within ttl_s.
_SIGNS = 6
_POLL_S = 0.5


class HeldError(UserError):
    """Another driver, which is alive, holds the run."""


@dataclass(kw_only=True)
class LeaseConfig:
    """How a run is kept to one driver."""

    # Seconds without a sign of life after which a driver on another machine counts as dead.
    ttl_s: float = 30.0

    def __post_init__(self) -> None:
        config.at_least(0.1, **{"lease.ttl_s": self.ttl_s})


def new_holder(spec: LeaseConfig) -> RunHolder:
    """This process as a holder, with a new id."""
    process = ProcessMark.own()._asdict()
    return RunHolder(id=uuid.uuid4().hex, host=socket.gethostname(), since_s=time.time(), ttl_s=spec.ttl_s, **process)


def wait_until_free(ledger: Ledger, *, take_over: bool, say: Callable[[str], None], gone: str = "") -> RunState:
    """Returns the state of the run once it may be taken; raises HeldError if its holder is alive, unless `take_over`.

    A holder on this machine counts only while its process runs. A holder on another machine is watched for its `ttl_s`
    before it counts as dead; `say` prints a line about that. `gone` is the id of a holder already found dead.
    """
    while True:
        state = ledger.head()
        holder = state.holder
        if not state.held or holder is None or take_over or holder.id == gone:
            return state
        what = f"{storage.shown(ledger.run_dir)} is held by {holder.described()}"
        alive = ProcessMark(holder.machine, holder.pid, holder.started).lives()
        if alive is None:
            say(f"{what}: waiting up to {holder.ttl_s:g} s for a sign of life")
            alive = _seen_alive(ledger, holder)
        if alive:
            raise HeldError(
                f"{what}, which is alive: stop it, name another run_dir, or give --take-over (pretrain) to stop it"
            )
        gone = holder.id


@contextlib.contextmanager
def hold(
    run_dir: str, spec: LeaseConfig, *, take_over: bool, say: Callable[[str], None], gone: str = ""
) -> Iterator[Lease]:
    """Holds the run for the block, once `wait_until_free` allows it.

    When another driver takes the run over, the main thread is interrupted as by Ctrl-C and the block ends with an
    OvertakenError. Any other error that is raised in the block after that becomes an OvertakenError too.
    """
    ledger = Ledger(run_dir)
    lease = _take(ledger, new_holder(spec), take_over, say, gone)
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
    """A run held by this process. Processes that publish checkpoints for it are given its `id`.

    `lost` is true once another driver is seen to hold the run.
    """

    def __init__(self, ledger: Ledger, holder: RunHolder, number: int) -> None:
        self.id = holder.id
        self._ledger, self._holder = ledger, holder
        self._seen, self._checked_s = number, time.monotonic()
        self._every_s = holder.ttl_s / _SIGNS
        self.lost, self._signs = False, 0
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._sign()
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
        self._thread.start()

    def held(self, *, now: bool = False) -> bool:
        """Whether this process still holds the run, as far as it knows.

        Reads the ledger with `now`, or when the last reading is old. An unreachable ledger does not count as a loss.
        """
        with self._lock, contextlib.suppress(UserError):
            if not self.lost and (now or time.monotonic() - self._checked_s > 2 * self._every_s):
                self._check_ledger()
        return not self.lost

    def close(self) -> None:
        """Releases the run, unless another driver holds it."""
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
            log.warning("the run %s could not be released: %s", storage.shown(self._ledger.run_dir), error)

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

    def _check_ledger(self) -> None:
        if (number := self._ledger.highest()) != self._seen:
            self.lost = not self._ledger.head().is_of(self.id)
            self._seen = number
        self._checked_s = time.monotonic()

    def _sign(self) -> None:
        self._signs += 1
        storage.write(_alive(self._ledger, self._holder), json.dumps({"signs": self._signs}).encode())


def _take(ledger: Ledger, me: RunHolder, take_over: bool, say: Callable[[str], None], gone: str) -> Lease:
    while True:
        state = wait_until_free(ledger, take_over=take_over, say=say, gone=gone).taken(me)
        if ledger.advance(state) and ledger.is_head(state):
            for name in storage.list_files(ledger.folder):
                if name.startswith("alive-"):
                    storage.remove(storage.join(ledger.folder, name))
            return Lease(ledger, me, state.number)
        # Another driver took it in the same moment: ask again whether it is alive.


def _seen_alive(ledger: Ledger, holder: RunHolder) -> bool:
    """Whether the holder writes a sign of life within its ttl_s; False at once when it has released the run."""
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
