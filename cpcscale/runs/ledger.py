"""The ledger of a run: which driver holds it and which checkpoints it has, as numbered entries.

`RUN/ledger/00000007.json` is the state of the run after seven changes; the entry with the highest number is current. A
process changes the state of entry n by creating entry n + 1. If several processes try, exactly one succeeds. A
checkpoint becomes valid when its ledger entry is created, so a process that has been overtaken can publish nothing,
however long it was paused between reading and writing. The checkpoints form one line of history: each was made by a
process that continued from the one before. No clock and no check of live processes is involved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias, TypeVar

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.progress import duration
from cpcscale.runs import checkpoint_files

log = logging.getLogger(__name__)

T = TypeVar("T")

_ENTRY = re.compile(r"(\d{8,})\.json")
# How many entries below the highest are kept, so that a slow reader still finds what it has listed.
_KEPT = 8
# A temporary file older than this belongs to a process that was killed, or that will find itself overtaken.
_ASIDE_S = 10.0
# How long a listing may lag behind what was written, and the pause between two looks.
_LATE_S, _LOOK_S = 10.0, 0.1


class OvertakenError(UserError):
    """Another process has taken the run over, so this one may not publish any more."""

    def __init__(self, run_dir: str, state: RunState) -> None:
        by = state.holder.described() if state.holder else "another process"
        super().__init__(f"{storage.shown(run_dir)} was taken over by {by}: this one stops and publishes nothing more")


@dataclass(frozen=True)
class RunHolder:
    """The driver that holds a run, or the last one that did.

    `machine`, `pid` and `started` identify its process (machine.ProcessMark).
    `since_s` is in seconds since 1970 by its own clock. Without a sign of life for `ttl_s` it counts as dead.
    """

    id: str
    host: str
    pid: int
    machine: str
    started: str
    since_s: float
    ttl_s: float

    def described(self) -> str:
        """A phrase for messages: where it runs, and for how long it has held the run."""
        return f"pid {self.pid} on {self.host} (since {duration(max(0.0, time.time() - self.since_s))})"


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint of the run: its folder's name, its step, and its held-out loss if it was measured."""

    folder: str
    step: int
    heldout_loss: float | None = None


# Given all checkpoints, the new one included, returns those that are kept however old they are.
KeepRule: TypeAlias = Callable[[tuple[CheckpointEntry, ...]], Iterable[CheckpointEntry]]


@dataclass(frozen=True)
class RunState:
    """The state of a run. Each method returns the next state, which holds once `Ledger.advance` has created its entry.

    `held` says whether `holder` holds the run now; if not, `holder` is the last one. `writer` is the number of the
    entry with which the publishing process started, 0 without one. `checkpoints` are in order of their steps; the best
    is chosen by `best_by`: the held-out loss or a probe (probe_log.py).
    """

    number: int = 0
    holder: RunHolder | None = None
    held: bool = False
    writer: int = 0
    checkpoints: tuple[CheckpointEntry, ...] = ()
    best_by: str = "loss"

    def is_of(self, holder: str) -> bool:
        """Whether the holder with this id holds the run now."""
        return self.held and self.holder is not None and self.holder.id == holder

    def taken(self, holder: RunHolder) -> RunState:
        """The state after `holder` has taken the run."""
        return replace(self, number=self.number + 1, holder=holder, held=True, writer=0)

    def released(self) -> RunState:
        """The state after the run was released."""
        return replace(self, number=self.number + 1, held=False, writer=0)

    def started_from(self, step: int, holder: str, best_by: str = "loss") -> RunState:
        """The state after a process starts to publish from `step` on; checkpoints of later steps are dropped.

        `holder` is the id of the driver that it works for. If that driver does not hold the run, nobody does any more.
        """
        number = self.number + 1
        stay = tuple(checkpoint for checkpoint in self.checkpoints if checkpoint.step <= step)
        owner = self.holder if self.is_of(holder) else None
        return RunState(number, owner, owner is not None, number, stay, best_by)

    def published(self, new: CheckpointEntry, keep: int, spare: KeepRule | None = None) -> RunState:
        """The state after `new` was published.

        The newest `keep` checkpoints stay, and those that `spare` returns; without `spare`, the one with the lowest
        held-out loss (the first of equals).
        """
        line = (*(each for each in self.checkpoints if each.step < new.step), new)
        best = lowest_loss(line)
        stay = {*line[-keep:], *(spare(line) if spare else [best] if best else [])}
        return replace(self, number=self.number + 1, checkpoints=tuple(each for each in line if each in stay))


def lowest_loss(checkpoints: tuple[CheckpointEntry, ...]) -> CheckpointEntry | None:
    """The checkpoint with the lowest finite held-out loss, the first of equals; None when none has one."""
    losses = [(each.heldout_loss, each) for each in checkpoints if each.heldout_loss is not None]
    finite = [each for each in losses if math.isfinite(each[0])]
    return min(finite, key=lambda each: each[0])[1] if finite else None


def heldout_loss(metrics: Mapping[str, float]) -> float | None:
    """The held-out loss by which checkpoints are compared, of all objectives if there are several; None without one."""
    return metrics.get("heldout_sum_loss", metrics.get("heldout_loss"))


class Ledger:
    """The ledger of one run folder (path or s3://)."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = storage.absolute(run_dir)
        self.folder, self.checkpoints = (storage.join(self.run_dir, name) for name in ("ledger", "checkpoints"))

    def url(self, checkpoint: CheckpointEntry) -> str:
        """The folder of a checkpoint."""
        return storage.join(self.checkpoints, checkpoint.folder)

    def head(self) -> RunState:
        """The current state of the run.

        Without any entry, or if the current entry is damaged, the state lists the checkpoints that have a marker.
        """

        def newest() -> tuple[int, bytes] | None:
            number = self.highest()
            with contextlib.suppress(storage.NotFoundError):
                return number, storage.read(self._entry(number)) if number else b""
            return None  # Removed since it was listed: there is a higher one, or the whole run was removed.

        number, data = self._await(newest, "lists entries that cannot be read")
        if number:
            try:
                return _parsed(number, data)
            except (ValueError, TypeError, KeyError):
                log.warning("%s is damaged: the checkpoints are taken from their folders", self._entry(number))
        # Folder names hold the numbers of lost entries; these numbers must not be used again.
        number = max([number, *(writer for _, writer in self.folders().values())])
        return RunState(number, checkpoints=self._scanned())

    def highest(self) -> int:
        """The number of the last entry, 0 without any."""
        return max(self._numbers(), default=0)

    def advance(self, state: RunState) -> bool:
        """Creates the entry of `state`. Returns whether it did; if not, another process made a change first."""
        # The random id makes the entries differ when two processes make the same change.
        text = json.dumps({"by": uuid.uuid4().hex, "state": asdict(state)})

        def made() -> bool | None:
            with contextlib.suppress(storage.NotFoundError):
                return storage.create(self._entry(state.number), _sealed(text))
            return None  # Another process has removed our temporary file, as one that was left over.

        if self._await(made, "loses new files"):
            return True
        self._listed(state.number)
        return False

    def is_head(self, state: RunState) -> bool:
        """Whether the entry of `state`, just created, is the highest one; removes old entries if so.

        It is not when others have advanced since, or when its number was free only because they removed old entries.
        """
        found = self._listed(state.number)
        if max(found, default=0) != state.number:
            return False
        for number in found:
            if number <= state.number - _KEPT:
                storage.remove(self._entry(number))
        return True

    def remove_unlisted(self, state: RunState) -> None:
        """Removes the checkpoints that `state` does not list, whole or not. `state` must have been the head.

        No later state can list one of them: later states list checkpoints of this state and of later writers only.
        """
        named = {checkpoint.folder for checkpoint in state.checkpoints}
        try:
            for folder, (_, writer) in self.folders().items():
                if folder not in named and writer <= state.number:
                    checkpoint_files.remove(storage.join(self.checkpoints, folder))
        except UserError as error:  # An overtaken process may still be writing there; the next call removes it.
            log.warning("an old checkpoint could not be removed yet: %s", error)
        local = storage.local_path(self.folder)
        for path in local.glob(".*.tmp") if local else ():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ASIDE_S:
                    path.unlink()

    def folders(self) -> dict[str, tuple[int, int]]:
        """{name: (step, writer)} of each checkpoint's folder, whole or not, in the order of step and writer."""
        local = storage.local_path(self.checkpoints)
        names: set[str] = set()
        with contextlib.suppress(storage.NotFoundError):
            names = {name.partition("/")[0] for name in storage.list_files(self.checkpoints)}
            # list_files skips a folder in which a killed process left only a temporary file.
            names |= {path.name for path in local.iterdir()} if local else set()
        found = {name: at for name in names if (at := checkpoint_files.parse_folder_name(name))}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def _scanned(self) -> tuple[CheckpointEntry, ...]:
        found = {}
        for folder, (step, _) in self.folders().items():
            url = storage.join(self.checkpoints, folder)
            with contextlib.suppress(checkpoint_files.TornError):
                checkpoint_files.read_marker(url)
                metrics = checkpoint_files.read_state(url)["position"].get("metrics", {})
                found[step] = CheckpointEntry(folder, step, heldout_loss(metrics))
        return tuple(found.values())

    def _listed(self, number: int) -> list[int]:
        """The numbers of the entries, once the entry `number`, which was made, is among them or has been removed."""

        def numbers() -> list[int] | None:
            found = self._numbers()
            return found if max(found, default=0) >= number or not storage.exists(self._entry(number)) else None

        return self._await(numbers, f"has entry {number} and does not list it")

    def _await(self, look: Callable[[], T | None], fault: str) -> T:
        """What `look` returns once that is not None: some stores list late. Raises UserError when it takes too long."""
        deadline = time.monotonic() + _LATE_S
        while (found := look()) is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.folder} {fault}, for {_LATE_S:g} s: a run needs a store that lists what was written, under "
                    "the same name and at once: use another store, or a local folder, for run_dir"
                )
            time.sleep(_LOOK_S)
        return found

    def _entry(self, number: int) -> str:
        return storage.join(self.folder, f"{number:08d}.json")

    def _numbers(self) -> list[int]:
        with contextlib.suppress(storage.NotFoundError):
            matches = (_ENTRY.fullmatch(name) for name in storage.list_files(self.folder))
            return [int(match.group(1)) for match in matches if match]
        return []


def _sealed(text: str) -> bytes:
    """One line of JSON and its hash, so that a damaged entry is recognised."""
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def _parsed(number: int, data: bytes) -> RunState:
    text = data.decode().partition("\n")[0]
    if _sealed(text) != data:
        raise ValueError("the hash does not match")
    state: dict[str, Any] = config.read_json(text)["state"]
    holder = RunHolder(**state["holder"]) if state["holder"] else None
    published = tuple(CheckpointEntry(**each) for each in state["checkpoints"])
    best_by = str(state.get("best_by", "loss"))
    return RunState(number, holder, bool(state["held"]), int(state["writer"]), published, best_by)
