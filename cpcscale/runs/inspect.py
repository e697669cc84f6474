"""Lists, describes and verifies the checkpoints of a run, without importing torch (`cpcscale checkpoint`)."""

from __future__ import annotations

import struct
import time
from dataclasses import asdict
from typing import Any

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.runs import checkpoint_files
from cpcscale.runs.ledger import Ledger, RunState
from cpcscale.runs.probe_log import Probe, Probes


def list_checkpoints(url: str) -> dict[str, Any]:
    """The checkpoints of a run folder (or the one checkpoint at `url`) by rising step, and who holds the run.

    Each has folder, step, writer, published, newest, best, audio_hours, heldout_loss, probe_ccc (mean), probe (running,
    done, failed or None), bytes, saved_at_s, age_s, and `why`: the reason it is torn, judged by file sizes, None when
    it is whole. Raises UserError when there is no checkpoint at `url`.
    """
    run = _Run(url)
    best = run.probes.best(run.state)
    newest = next((folder for folder in reversed(run.published) if not run.why(folder)), None)
    rows = []
    for folder in run.folders:
        step, writer = checkpoint_files.parse_folder_name(folder) or (0, 0)
        marks = {
            "published": folder in run.published,
            "newest": folder == newest,
            "best": best is not None and folder == best.folder,
        }
        row = {"folder": folder, "step": step, "writer": writer, **marks, "why": run.why(folder)}
        rows.append({**row, **_facts(run.place(folder), step), **_probed(run.probes.of(folder))})
    holder = asdict(run.state.holder) if run.state.held and run.state.holder else None
    return {"path": url, "holder": holder, "checkpoints": rows}


def verify_checkpoints(url: str) -> dict[str, Any]:
    """Reads every byte of a run's published checkpoints, or of the one at `url`.

    Returns {path, checkpoints: {folder: [problems]}, ok}.
    """
    run = _Run(url)
    folders = [folder for folder in run.folders if run.one or folder in run.published]
    wrong = {folder: list(checkpoint_files.find_problems(run.place(folder), every_byte=True)) for folder in folders}
    return {"path": url, "checkpoints": wrong, "ok": not any(wrong.values())}


def describe_checkpoint(url: str) -> dict[str, Any]:
    """The content of one checkpoint, or of the newest whole one of a run.

    Returns {checkpoint, saved_at_s, config_hash, position, tensors: {file: {name: {dtype, shape}}}}. Raises UserError
    when no checkpoint is whole, judged by file sizes.
    """
    run = _Run(url)
    place = run.whole()[-1]
    names = [name for name in checkpoint_files.read_marker(place) if name.endswith(checkpoint_files.TENSORS)]
    kept = {name: checkpoint_files.read_state(place).get(name) for name in ("saved_at_s", "config_hash", "position")}
    tensors = {name.removesuffix(checkpoint_files.TENSORS): _tensors(storage.join(place, name)) for name in names}
    return {"checkpoint": place, **kept, "tensors": tensors}


def whole_checkpoints(url: str) -> tuple[str, list[str]]:
    """(run_dir, the places of its whole published checkpoints by rising step); of a single checkpoint, its own place.

    Raises UserError when none is whole, judged by file sizes.
    """
    run = _Run(url)
    return run.run_dir, run.whole()


class _Run:
    """A run and its checkpoint `folders`; with `one`, a single checkpoint and the run that it belongs to, if any."""

    def __init__(self, url: str) -> None:
        if not storage.exists(url):
            raise UserError(f"there is nothing at {url}: check the path")
        self._url = url
        place, _, name = storage.absolute(url).rpartition("/")
        # A torn one has no marker, and one that was renamed has another name.
        marked = storage.exists(storage.join(url, checkpoint_files.MARKER))
        self.one = marked or checkpoint_files.parse_folder_name(name) is not None
        inside = place.endswith("/checkpoints")
        self._base = place if self.one else storage.join(url, "checkpoints")
        self.run_dir = place.removesuffix("/checkpoints") if self.one else url
        ledger, self.probes = Ledger(self.run_dir), Probes(self.run_dir)
        self.state = RunState() if self.one and not inside else ledger.head()
        self.published = [each.folder for each in self.state.checkpoints]
        found = {*ledger.folders(), *self.published}
        self.folders = (
            [name] if self.one else sorted(found, key=lambda each: checkpoint_files.parse_folder_name(each) or (0, 0))
        )
        if not self.folders:
            raise UserError(
                f"no checkpoint at {url}: name the run_dir of a `cpcscale pretrain` run, or one of its "
                "checkpoints/step-* folders"
            )

    def place(self, folder: str) -> str:
        return storage.join(self._base, folder)

    def whole(self) -> list[str]:
        """The places of published checkpoints that are whole; raises UserError when there is none."""
        whole = [folder for folder in self.folders if (self.one or folder in self.published) and not self.why(folder)]
        if not whole:
            last = self.folders[-1]
            raise UserError(f"no whole checkpoint at {self._url} ({last}: {self.why(last)}): see `ls`")
        return [self.place(folder) for folder in whole]

    def why(self, folder: str) -> str | None:
        """The reason that a checkpoint is torn, judged by file sizes; None when it is whole."""
        problems = list(checkpoint_files.find_problems(self.place(folder), every_byte=False))
        if problems and not self.one and folder not in self.published:
            return "not published: a save that was cut off, or is under way"
        return ", ".join(problems) or None


def _facts(url: str, step: int) -> dict[str, Any]:
    """Step, size, age and metrics of a checkpoint; None for whatever a torn one lacks, `step` if it lacks that."""
    size: int | None = None
    state: dict[str, Any] = {"position": {}}
    try:
        state = checkpoint_files.read_state(url)
        size = sum(file.bytes for file in checkpoint_files.read_marker(url).values())
    except checkpoint_files.TornError:
        pass
    position = state["position"]
    audio_s = position.get("audio_s")
    return {
        "step": position.get("step", step),
        "audio_hours": None if audio_s is None else audio_s / 3600,
        "heldout_loss": position.get("metrics", {}).get("heldout_loss"),
        "bytes": size,
        "saved_at_s": state.get("saved_at_s"),
        "age_s": max(0.0, time.time() - state["saved_at_s"]) if "saved_at_s" in state else None,
    }


def _probed(probe: Probe | None) -> dict[str, Any]:
    return {"probe_ccc": probe.score if probe else None, "probe": probe.status if probe else None}


def _tensors(url: str) -> dict[str, dict[str, Any]]:
    """{name: {dtype, shape}} of a safetensors file: its first 8 bytes are the length of the JSON header after them."""
    start = storage.read(url, 0, 8)
    try:
        (count,) = struct.unpack("<Q", start)
        if count > storage.size(url):
            raise ValueError("the header is longer than the file")
        header = config.read_json(storage.read(url, 8, 8 + count))
        return {
            name: {"dtype": str(tensor["dtype"]), "shape": [int(size) for size in tensor["shape"]]}
            for name, tensor in header.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{url} holds tensors that cannot be read: check it with `cpcscale checkpoint verify`"
        ) from None
