"""Checkpoints of a run: published by a marker that carries every file's hash, verified before use, never unpickled.

`RUN/checkpoints/step-00000500/` holds `model.safetensors`, `optimizer.safetensors`, `state.json` and, written last,
`COMPLETE.json`. A folder without a marker that matches its files is torn: it is skipped with a line that says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, ModelConfig, build

log = logging.getLogger(__name__)

MARKER = "COMPLETE.json"
FORMAT = 1
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class TornError(UserError):
    """A checkpoint that is not whole: an older one may be."""


@dataclass
class Position:
    """What of a run is neither weights nor config: where it stands and what it has seen."""

    # Updates done; the data position t of the run.
    step: int
    fingerprint: str
    # Recipe.identity() of the run.
    identity: dict[str, Any]
    # Order.chapters of the run, as [step, epoch, shards]; empty: one chapter of the whole set.
    chapters: list[list[int]] = field(default_factory=list)
    # (epoch, position) of every lane before `step`: a cross-check of t.
    cursors: list[list[int]] = field(default_factory=list)
    audio_s: float = 0.0
    # Updates skipped, those of them that were not finite, and windows whose audio does not decode.
    skipped: int = 0
    nonfinite: int = 0
    bad: int = 0
    bad_windows: list[dict[str, Any]] = field(default_factory=list)
    # The loss scale of fp16, empty otherwise.
    scaler: dict[str, Any] = field(default_factory=dict)
    # The metrics of `step`, so that a finished run can state its result again.
    metrics: dict[str, float] = field(default_factory=dict)
    # The newest logged [step, metrics], for a tracker that missed some when its process died.
    records: list[list[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint in memory."""

    url: str
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    position: Position


class Checkpoints:
    """The checkpoints of one run folder (path or s3://)."""

    def __init__(self, run_dir: str, keep: int = 2) -> None:
        self.folder = storage.join(run_dir, "checkpoints")
        self._keep = keep

    def save(self, model: CPC, optimizer: torch.optim.Optimizer, position: Position) -> str:
        """Publishes a checkpoint, then removes what retention does not keep. Returns its folder."""
        url = self.at(position.step)
        state = {"format": FORMAT, "model": asdict(model.config), "position": asdict(position)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        contents = {
            "model.safetensors": save_tensors(tensors),
            "optimizer.safetensors": save_tensors(_flat(optimizer)),
            "state.json": json.dumps(state, indent=1).encode(),
        }
        storage.remove(storage.join(url, MARKER))
        for name, data in contents.items():
            storage.write(storage.join(url, name), data)
        marker = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        storage.write(storage.join(url, MARKER), json.dumps(marker).encode())
        self._retain(position)
        return url

    def newest(self) -> Restored | None:
        """The newest whole checkpoint, or None; a torn one is skipped with a warning. A store that fails raises."""
        for step in reversed(self._steps(r"[^/]+")):
            try:
                return read(self.at(step))
            except TornError as error:
                log.warning("skipping a checkpoint: %s", error)
        return None

    def at(self, step: int) -> str:
        """The folder of the checkpoint of `step`."""
        return storage.join(self.folder, f"step-{step:08d}")

    def steps(self) -> list[int]:
        """The steps that have a published checkpoint, ascending."""
        return self._steps(re.escape(MARKER))

    def _steps(self, file: str) -> list[int]:
        """The steps whose folder has a file of this pattern, ascending."""
        try:
            names = storage.list_files(self.folder)
        except storage.NotFoundError:
            return []
        found = (re.fullmatch(rf"step-(\d+)/{file}", name) for name in names)
        return sorted({int(match.group(1)) for match in found if match})

    def _retain(self, position: Position) -> None:
        best_url = storage.join(self.folder, "best.json")
        best = self._best(best_url)
        loss = position.metrics.get("heldout_loss")
        if loss is not None and math.isfinite(loss) and (best is None or loss < best["heldout_loss"]):
            best = {"step": position.step, "heldout_loss": loss}
            storage.write(best_url, json.dumps(best).encode())
        # Later ones are torn: the run would have gone on from them.
        steps = [step for step in self.steps() if step <= position.step]
        kept = {*steps[-self._keep :], *([best["step"]] if best else [])}
        for step in steps:
            if step not in kept:
                url = self.at(step)
                # The marker goes first: a folder half removed must not look whole.
                storage.remove(storage.join(url, MARKER))
                storage.remove(url)

    def _best(self, url: str) -> dict[str, Any] | None:
        if not storage.exists(url):
            return None
        data = storage.read(url)
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError):
            log.warning("%s is damaged: the best checkpoint is chosen anew", url)
            return None


def read(url: str) -> Restored:
    """The checkpoint in folder `url`, every file checked against the marker. Raises TornError when it is not whole."""
    try:
        marker = storage.read(storage.join(url, MARKER))
        contents = {name: storage.read(storage.join(url, name)) for name in _FILES}
    except storage.NotFoundError as error:
        raise TornError(f"{url} is not a whole checkpoint: {error}") from None
    try:
        hashes = dict(json.loads(marker))
    except (ValueError, TypeError):
        raise TornError(f"{url} is torn: {MARKER} is damaged") from None
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != hashes.get(name):
            raise TornError(f"{url} is torn: {name} does not match the hash in {MARKER}")
    state = json.loads(contents["state.json"])
    if state["format"] > FORMAT:
        raise UserError(f"{url} has checkpoint format {state['format']}, this cpcscale reads up to {FORMAT}: upgrade")
    try:
        model, optimizer = (load_tensors(contents[name]) for name in _FILES[:2])
    except SafetensorError as error:
        raise UserError(f"{url} holds tensors that cannot be read: {error}") from None
    return Restored(url, model, optimizer, Position(**state["position"]))


def restore(restored: Restored, model: CPC, optimizer: torch.optim.Optimizer) -> None:
    """Puts the weights and the optimiser's state back in place."""
    model.load_state_dict(restored.model)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in restored.optimizer.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_encoder(url: str) -> tuple[CPC, dict[str, Any]]:
    """(network, metadata) of a pretraining run's newest whole checkpoint, or of one checkpoint folder.

    The metadata has `url`, `step`, `fingerprint`, `audio_s` and `identity`. Raises UserError when there is none.
    """
    if storage.exists(storage.join(url, MARKER)):
        restored: Restored | None = read(url)
    else:
        restored = Checkpoints(url).newest()
    if restored is None:
        raise UserError(
            f"no checkpoint at {url}: name the run_dir of a `cpcscale pretrain` run, or one of its checkpoints/step-* "
            "folders"
        )
    position = restored.position
    model = build(config.build(ModelConfig, position.identity["model"]), seed=0)
    model.load_state_dict(restored.model)
    kept = ("step", "fingerprint", "audio_s", "identity")
    return model, {"url": restored.url, **{name: getattr(position, name) for name in kept}}


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's state as `parameter number.key` tensors."""
    return {
        f"{number}.{key}": tensor.detach().cpu().contiguous()
        for number, entries in optimizer.state_dict()["state"].items()
        for key, tensor in entries.items()
    }
