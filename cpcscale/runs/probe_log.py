"""The probe results of a run's checkpoints as files: `RUN/probe/set.json` and one file for each probed checkpoint.

A probe is a small emotion evaluation of one checkpoint, made by the driver while the run goes on
(cluster/probe_beside.py). The process that publishes checkpoints (publisher.py) keeps those that are being probed or
may be next. The two processes never wait for each other. The driver claims the newest checkpoint that is due, then
checks that it still is the newest. The publisher keeps the two newest that are due and every claimed one, so it cannot
remove a checkpoint between these two steps. A claimed checkpoint therefore exists until its result does, and the
checkpoint with the best result is always kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from cpcscale import config, storage
from cpcscale.runs import checkpoint_files
from cpcscale.runs.ledger import CheckpointEntry, Ledger, RunState, lowest_loss

log = logging.getLogger(__name__)

_SET = "set.json"


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """The labelled set that a run's checkpoints are scored on, always in the same way.

    `settings` are the further settings that decide a result; `marks` are warnings shown with every result. Checkpoints
    at multiples of `stride` steps are probed; 0: no further one is.
    """

    corpus: str
    corpus_digest: str
    speakers: list[str]
    marks: list[str]
    settings: dict[str, Any]
    stride: int

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of this step is to be probed."""
        return self.stride > 0 and step % self.stride == 0

    def tags(self) -> dict[str, str]:
        """The MLflow tags that describe the set."""
        return {
            "cpcscale.probe_corpus": self.corpus,
            "cpcscale.probe_corpus_hash": self.corpus_digest,
            "cpcscale.probe_speakers": ",".join(self.speakers),
            "cpcscale.probe_marks": ",".join(self.marks),
        }


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The probe of one checkpoint: running, done with `ccc` by primitive and `mean`, or failed with the cause `why`."""

    folder: str
    step: int
    status: Literal["running", "done", "failed"]
    audio_hours: float = 0.0
    ccc: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    why: str = ""

    @property
    def score(self) -> float | None:
        """The mean CCC, by which the best checkpoint is chosen; None when it is missing or not finite."""
        mean = self.ccc.get("mean") if self.status == "done" else None
        return mean if mean is not None and math.isfinite(mean) else None


class Probes:
    """The probes of one run folder (path or s3://)."""

    def __init__(self, run_dir: str) -> None:
        self.folder = storage.join(run_dir, "probe")
        self._over: dict[str, Probe] = {}

    def probe_set(self) -> ProbeSet | None:
        """The set that the run is or was probed on; None when it never was."""
        url = storage.join(self.folder, _SET)
        try:
            return ProbeSet(**config.read_json(storage.read(url)))
        except storage.NotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
            log.warning("%s is damaged: the run counts as not probed", url)
            return None

    def write_set(self, probe_set: ProbeSet) -> None:
        """Writes the set that the run is probed on."""
        storage.write(storage.join(self.folder, _SET), _json(probe_set))

    def retire_set(self) -> None:
        """Ends probing: no checkpoint of the run is due any more."""
        before = self.probe_set()
        if before and before.stride:
            self.write_set(replace(before, stride=0))

    def of(self, folder: str) -> Probe | None:
        """The probe of the checkpoint in this folder of the run; None when there is none."""
        if folder in self._over:
            return self._over[folder]
        url = self._url(folder)
        try:
            probe = Probe(**config.read_json(storage.read(url)))
        except storage.NotFoundError:
            return None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
            log.warning("%s is damaged: the checkpoint counts as not probed", url)
            return None
        if probe.status != "running":
            self._over[folder] = probe
        return probe

    def all(self) -> list[Probe]:
        """Every probe of the run by rising step; if a step was made twice, only the later one."""
        with contextlib.suppress(storage.NotFoundError):
            names = [name.removesuffix(".json") for name in storage.list_files(self.folder)]
            found = sorted((at, name) for name in names if (at := checkpoint_files.parse_folder_name(name)))
            probes = {step: probe for (step, _), name in found if (probe := self.of(name))}
            return list(probes.values())
        return []

    def claim(self, ledger: Ledger, probe_set: ProbeSet, *, every: bool = False) -> CheckpointEntry | None:
        """Claims the newest checkpoint that is due and returns it; None when that one has been probed.

        A claim is a probe with the status `running`; it keeps the checkpoint from being removed. With `every` the
        newest checkpoint counts, due or not: for the end of a run, when nothing more is published. Only one process may
        claim.
        """

        def newest() -> CheckpointEntry | None:
            line = ledger.head().checkpoints
            return next((each for each in reversed(line) if every or probe_set.is_due(each.step)), None)

        while chosen := newest():
            before = self.of(chosen.folder)
            # A running probe is our own claim, from a try that the store interrupted.
            if before and before.status != "running":
                return None
            self.write(Probe(folder=chosen.folder, step=chosen.step, status="running"))
            if newest() == chosen:
                return chosen
            self.remove(chosen.folder)
        return None

    def write(self, probe: Probe) -> None:
        """Writes the state of a probe."""
        storage.write(self._url(probe.folder), _json(probe))

    def remove(self, folder: str) -> None:
        """Removes the probe of a checkpoint."""
        self._over.pop(folder, None)
        storage.remove(self._url(folder))

    def best(self, state: RunState) -> CheckpointEntry | None:
        """The best checkpoint by `state.best_by`: the lowest held-out loss or the highest mean CCC.

        The first of equals; None when no checkpoint has a score.
        """
        return self._best(state.checkpoints, [self.of(each.folder) for each in state.checkpoints], state.best_by)

    def select_kept(
        self, line: Sequence[CheckpointEntry], best_by: str, probe_set: ProbeSet | None
    ) -> Collection[CheckpointEntry]:
        """The checkpoints that are kept however old they are: the best, those being probed, and the two newest that
        are due and later than any probe."""
        # Each probe is read once: one that ended between two readings would count neither as running nor as the best.
        known = [self.of(each.folder) for each in line]
        best = self._best(line, known, best_by)
        running = [each for each, probe in zip(line, known, strict=True) if probe and probe.status == "running"]
        last = max((probe.step for probe in known if probe), default=-1)
        waiting = [each for each in line if each.step > last and probe_set and probe_set.is_due(each.step)]
        return [*([best] if best else []), *running, *waiting[-2:]]

    @staticmethod
    def _best(line: Sequence[CheckpointEntry], known: Sequence[Probe | None], best_by: str) -> CheckpointEntry | None:
        if best_by == "loss":
            return lowest_loss(tuple(line))
        pairs = zip(line, known, strict=True)
        scored = [(score, each) for each, probe in pairs if probe and (score := probe.score) is not None]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None

    def _url(self, folder: str) -> str:
        return storage.join(self.folder, f"{folder}.json")


def _json(of: ProbeSet | Probe) -> bytes:
    return (json.dumps(asdict(of), indent=1) + "\n").encode()
