"""Who holds a run and which checkpoints it has: numbered entries, each written only where none stands.

`RUN/ledger/00000007.json` is the state of the run after seven changes; the highest number counts. A change is made to
the state of entry n by creating entry n + 1, which of several who try exactly one does. So a checkpoint is published by
the same act that finds out whether its writer still may: however long a process was stopped or cut off between a look
and a write, once another has taken the run over nothing of it is added, and the checkpoints are one line of history,
each made by a process that went on from the one before. No clock and no liveness of a process enters into this.
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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.progress import duration
from cpcscale.runs import checkpoint_files

log = logging.getLogger(__name__)

_ENTRY = re.compile(r"(\d{8,})\.json")
# Entries below the highest that stay, so that a slow reader finds what it has listed.
_KEPT = 8
# A file written aside for longer than this is of a process that was killed, or that will find itself overtaken.
_ASIDE_S = 10.0


class OvertakenError(UserError):
    """This process may not publish any more: another one has taken the run over."""

    def __init__(self, run_dir: str, state: RunState) -> None:
        by = state.holder.described() if state.holder else "another process"
        super().__init__(
            f"{storage.shown(run_dir)} was taken over by {by}: this one stops, and nothing of it is published any more"
        )


@dataclass(frozen=True)
class RunHolder:
    """A driver that a run belongs to, or did.

    `machine` and `started` tell its process for sure, where the machine says so (see lease.py); else they are empty.
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
        """Where it runs, and for how long it has held the run."""
        return f"pid {self.pid} on {self.host} (since {duration(max(0.0, time.time() - self.since_s))})"


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint of the run: its folder's name, its step, and its held-out loss where it was measured."""

    folder: str
    step: int
    heldout_loss: float | None = None


# Of the checkpoints of a line, the new one included, those that stay however old they are.
KeepRule: TypeAlias = Callable[[tuple[CheckpointEntry, ...]], Iterable[CheckpointEntry]]


@dataclass(frozen=True)
class RunState:
    """The state of a run; each method gives the next one, which is true once its entry is created.

    `held`: it belongs to `holder`, which else is the last one it belonged to. `writer` is the number of the entry with
    which the process that publishes began, 0 while there is none. `checkpoints` are ascending in their steps; the best
    of them is so by `best_by`, the loss or a probe (probes.py).
    """

    number: int = 0
    holder: RunHolder | None = None
    held: bool = False
    writer: int = 0
    checkpoints: tuple[CheckpointEntry, ...] = ()
    best_by: str = "loss"

    def is_of(self, holder: str) -> bool:
        """Whether the run belongs to the holder of this id."""
        return self.held and self.holder is not None and self.holder.id == holder

    def taken(self, holder: RunHolder) -> RunState:
        """The run belongs to `holder`."""
        return replace(self, number=self.number + 1, holder=holder, held=True, writer=0)

    def released(self) -> RunState:
        """The run belongs to nobody."""
        return replace(self, number=self.number + 1, held=False, writer=0)

    def started_from(self, step: int, holder: str, best_by: str = "loss") -> RunState:
        """A process goes on from `step` and will publish, in the name of the holder or of none; what is later goes."""
        number = self.number + 1
        stay = tuple(checkpoint for checkpoint in self.checkpoints if checkpoint.step <= step)
        owner = self.holder if self.is_of(holder) else None
        return RunState(number, owner, owner is not None, number, stay, best_by)

    def published(self, new: CheckpointEntry, keep: int, spare: KeepRule | None = None) -> RunState:
        """The checkpoint is the newest; the newest `keep` stay, and those to `spare`: without it, the first with the
        lowest held-out loss."""
        line = (*(each for each in self.checkpoints if each.step < new.step), new)
        best = lowest_loss(line)
        stay = {*line[-keep:], *(spare(line) if spare else [best] if best else [])}
        return replace(self, number=self.number + 1, checkpoints=tuple(each for each in line if each in stay))


def lowest_loss(checkpoints: tuple[CheckpointEntry, ...]) -> CheckpointEntry | None:
    """The first of those with the lowest held-out loss; None when none has one."""
    losses = [(each.heldout_loss, each) for each in checkpoints if each.heldout_loss is not None]
    finite = [each for each in losses if math.isfinite(each[0])]
    return min(finite, key=lambda each: each[0])[1] if finite else None


class Ledger:
    """The ledger of one run folder (path or s3://)."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.folder, self.checkpoints = storage.join(run_dir, "ledger"), storage.join(run_dir, "checkpoints")

    def url(self, checkpoint: CheckpointEntry) -> str:
        """The folder of a checkpoint."""
        return storage.join(self.checkpoints, checkpoint.folder)

    def head(self) -> RunState:
        """The state of the run. Where nothing says it, or a damaged entry, checkpoints that have a marker count."""
        while number := self.highest():
            try:
                return _parsed(number, storage.read(self._entry(number)))
            except storage.NotFoundError:
                continue  # Removed since, so there are higher ones; or the whole run is.
            except (ValueError, TypeError, KeyError):
                log.warning("%s is damaged: the checkpoints are taken from their folders", self._entry(number))
                break
        # Numbers of entries that are lost stand in the folders' names, and are not given again.
        number = max([number, *(writer for _, writer in self.folders().values())])
        return RunState(number, checkpoints=self._scanned())

    def highest(self) -> int:
        """The number of the last entry, 0 without any."""
        return max(self._numbers(), default=0)

    def advance(self, state: RunState) -> bool:
        """Creates the entry of `state`; whether it did. Where not, another process has made a change first."""
        # The same change made by two processes is two entries.
        text = json.dumps({"by": uuid.uuid4().hex, "state": asdict(state)})
        try:
            return storage.create(self._entry(state.number), _sealed(text))
        except storage.NotFoundError:
            return False  # What was written aside has been cleared away by those who went on.

    def is_head(self, state: RunState) -> bool:
        """Whether `state`, just created, is the head.

        It is not where others have gone on from it since, or where it was created in a gap that they left.
        """
        found = self._numbers()
        if max(found, default=0) != state.number:
            return False
        for number in found:
            if number <= state.number - _KEPT:
                storage.remove(self._entry(number))
        return True

    def remove_unlisted(self, state: RunState) -> None:
        """Removes the checkpoints that `state` does not name, whole or not. It has been the head since its creation.

        No later state names one of them either: it names those of this one, and those of later writers.
        """
        named = {checkpoint.folder for checkpoint in state.checkpoints}
        try:
            for folder, (_, writer) in self.folders().items():
                if folder not in named and writer <= state.number:
                    checkpoint_files.remove(storage.join(self.checkpoints, folder))
        except UserError as error:  # An overtaken process may be writing there still: the next time it will not.
            log.warning("a checkpoint that is not kept stays for now: %s", error)
        local = storage.local_path(self.folder)
        for path in local.glob(".*.tmp") if local else ():
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ASIDE_S:
                    path.unlink()

    def folders(self) -> dict[str, tuple[int, int]]:
        """The name, step and writer of each checkpoint's folder, whole or not, in the order of both numbers."""
        local = storage.local_path(self.checkpoints)
        names: set[str] = set()
        with contextlib.suppress(storage.NotFoundError):
            names = {name.partition("/")[0] for name in storage.list_files(self.checkpoints)}
            # That lists no folder in which a killed process left nothing but a file written aside.
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
                found[step] = CheckpointEntry(folder, step, metrics.get("heldout_loss"))
        return tuple(found.values())

    def _entry(self, number: int) -> str:
        return storage.join(self.folder, f"{number:08d}.json")

    def _numbers(self) -> list[int]:
        with contextlib.suppress(storage.NotFoundError):
            matches = (_ENTRY.fullmatch(name) for name in storage.list_files(self.folder))
            return [int(match.group(1)) for match in matches if match]
        return []


def _sealed(text: str) -> bytes:
    """One line of JSON and the hash of it, so that no flipped bit reads as another state."""
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def _parsed(number: int, data: bytes) -> RunState:
    text = data.decode().partition("\n")[0]
    if _sealed(text) != data:
        raise ValueError("the hash does not match")
    state: dict[str, Any] = json.loads(text)["state"]
    holder = RunHolder(**state["holder"]) if state["holder"] else None
    published = tuple(CheckpointEntry(**each) for each in state["checkpoints"])
    best_by = str(state.get("best_by", "loss"))
    return RunState(number, holder, bool(state["held"]), int(state["writer"]), published, best_by)
