"""Checkpoints in memory: what they hold, how they are read, and how a network and an optimiser are restored from them.

runs/checkpoint_files.py defines their files, runs/ledger.py which checkpoints of a run are valid. Nothing is unpickled.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, ModelConfig, build
from cpcscale.runs import checkpoint_files
from cpcscale.runs.checkpoint_files import STATE, TENSORS
from cpcscale.runs.ledger import Ledger, RunState
from cpcscale.runs.probe_log import Probes, ProbeSet
from cpcscale.train.ema import Ema
from cpcscale.train.ema import mean_weights as ema_weights

log = logging.getLogger(__name__)

# {file: {name: tensor}}; the files are `model`, `objective`, `optimizer` and, with a running mean, `ema`.
Tensors = Mapping[str, Mapping[str, Tensor]]
_NETWORK = "model."
# What releases up to 0.2 call state beside the network's.
_RENAMED = {"log_scale": "heads.infonce.log_scale"}


@dataclass
class RunPosition:
    """The state of a run beside its weights and config: its step and what it has seen so far.

    Values inside a field are replaced or added, never changed in place.
    """

    # Updates done; the data position t of the run.
    step: int
    fingerprint: str
    # Recipe.identity() of the run.
    identity: dict[str, Any]
    # RunOrder.chapters as [step, epoch, shards]; empty: one chapter with all shards.
    chapters: list[list[int]] = field(default_factory=list)
    # (epoch, position) of every lane before `step`: a cross-check of `step`.
    cursors: list[list[int]] = field(default_factory=list)
    audio_s: float = 0.0
    # Updates skipped, how many of them because of a loss or gradient that is not finite, windows that do not decode.
    skipped: int = 0
    nonfinite: int = 0
    bad: int = 0
    bad_windows: list[dict[str, Any]] = field(default_factory=list)
    # The state of fp16's loss scaler, empty otherwise.
    scaler: dict[str, Any] = field(default_factory=dict)
    # The metrics of `step`, from which a finished run can return its result again.
    metrics: dict[str, float] = field(default_factory=dict)
    # The newest logged [step, metrics], for a tracker that missed some when its process died.
    records: list[list[Any]] = field(default_factory=list)

    def copied(self) -> RunPosition:
        """A snapshot, which later additions to this position do not change."""
        return dataclasses.replace(self, **{each.name: copy.copy(getattr(self, each.name)) for each in fields(self)})


@dataclass(frozen=True)
class RestoredCheckpoint:
    """A verified checkpoint in memory: {file: {name: tensor}} and its position."""

    url: str
    tensors: dict[str, dict[str, Tensor]]
    position: RunPosition
    # The ProbeSet of the run as a dict; empty when the run was not probed.
    probe_set: dict[str, Any] = field(default_factory=dict)


def checkpoint_files_of(
    tensors: Tensors, position: RunPosition, spec: object, probe_set: ProbeSet | None = None
) -> dict[str, bytes]:
    """{name: bytes} of the files of a checkpoint.

    `spec` is the config of the run; secrets are left out. `probe_set` is stored so that a later evaluation can tell
    that the checkpoint may have been chosen by its score on this set.
    """
    state = {
        "saved_at_s": time.time(),
        "config": config.to_dict(spec),
        "config_hash": config.digest(spec),
        "position": vars(position),
        "probe_set": dataclasses.asdict(probe_set) if probe_set else None,
    }
    found = {f"{name}{TENSORS}": save_tensors(dict(part)) for name, part in tensors.items()}
    return {**found, STATE: json.dumps(state).encode()}


def load_newest(ledger: Ledger, state: RunState) -> RestoredCheckpoint | None:
    """The newest whole checkpoint of this state of a run, or None. Skips torn ones with a warning.

    Raises UserError when the store fails.
    """
    for checkpoint in reversed(state.checkpoints):
        try:
            return load_checkpoint(ledger.url(checkpoint))
        except checkpoint_files.TornError as error:
            log.warning("skipping a torn checkpoint: %s", error)
    return None


def load_checkpoint(url: str) -> RestoredCheckpoint:
    """The checkpoint in folder `url`, every file checked against its hash. Raises TornError when it is torn."""
    found = checkpoint_files.read_files(url)
    state = checkpoint_files.parse_state(url, found[STATE])
    position, probe_set = state["position"], state.get("probe_set") or {}
    try:
        tensors = {
            name.removesuffix(TENSORS): load_tensors(data) for name, data in found.items() if name.endswith(TENSORS)
        }
        return RestoredCheckpoint(url, tensors, RunPosition(**position), probe_set)
    except SafetensorError as error:
        raise UserError(f"{url} holds tensors that cannot be read: {error}") from None
    except TypeError as error:
        raise UserError(f"{url} holds a position that cannot be read: {error}") from None


def collect_tensors(
    contrast: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file, not copied: the network (`contrast.model`), other state of `contrast`, the
    optimiser's state as `PARAMETER_NUMBER.KEY`, and with `ema` the mean weights. `restore` puts them back."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "objective": {}, "optimizer": {}}
    for name, tensor in contrast.state_dict().items():
        part = "model" if name.startswith(_NETWORK) else "objective"
        parts[part][name.removeprefix(_NETWORK)] = tensor
    for number, entries in optimizer.state_dict()["state"].items():
        parts["optimizer"] |= {f"{number}.{key}": tensor for key, tensor in entries.items()}
    return parts | ({"ema": ema.state()} if ema else {})


def restore(
    restored: RestoredCheckpoint, contrast: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None
) -> None:
    """Loads the weights, the optimiser's state and the mean weights from a checkpoint."""
    network = {f"{_NETWORK}{name}": tensor for name, tensor in restored.tensors["model"].items()}
    heads = {_RENAMED.get(name, name): tensor for name, tensor in restored.tensors["objective"].items()}
    contrast.load_state_dict(network | heads)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in restored.tensors["optimizer"].items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if ema:
        ema.load(restored.tensors["ema"])


def load_encoder(url: str, which: Literal["newest", "best"] = "newest") -> tuple[CPC, dict[str, Any]]:
    """(network, metadata) of a pretraining run's newest whole checkpoint or its best, or of one checkpoint folder.

    The weights are the running mean if the run has one. The metadata holds `url`, `step`, `fingerprint` (of the shard
    set), `audio_s`, `identity` (of the recipe), `probe_set` (empty when the run was not probed) and how the checkpoint
    was `chosen`: "newest", "best by loss", "best by probe" or "by name". Raises UserError when there is none.
    """
    restored, chosen = _chosen(url, which)
    if restored is None:
        raise UserError(
            f"no checkpoint at {url}: name the run_dir of a `cpcscale pretrain` run, or one of its checkpoints/step-* "
            "folders"
        )
    position = restored.position
    model = build(config.build(ModelConfig, position.identity["model"]), seed=0)
    model.load_state_dict(
        ema_weights(restored.tensors["ema"]) if "ema" in restored.tensors else restored.tensors["model"]
    )
    kept = ("step", "fingerprint", "audio_s", "identity")
    facts = {name: getattr(position, name) for name in kept}
    return model, {"url": restored.url, **facts, "chosen": chosen, "probe_set": restored.probe_set}


def is_pretraining(url: str) -> bool:
    """Whether the folder `url` is the run_dir of a pretraining, or one of its checkpoints."""
    ledger = Ledger(url)
    return any(storage.exists(place) for place in (storage.join(url, STATE), ledger.folder, ledger.checkpoints))


def _chosen(url: str, which: Literal["newest", "best"]) -> tuple[RestoredCheckpoint | None, str]:
    """The checkpoint that `url` and `which` name, and how it was chosen."""
    marker = storage.join(url, checkpoint_files.MARKER)
    if storage.exists(marker):
        restored = load_checkpoint(url)
        # A copy in MLflow says how its run chose it.
        if known := config.read_json(storage.read(marker)).get("chosen"):
            return restored, str(known)
        return restored, "best by probe" if _is_best_by_probe(url) else "by name"
    ledger = Ledger(url)
    state = ledger.head()
    if which == "newest" or not state.checkpoints:
        return load_newest(ledger, state), "newest"
    best = Probes(url).best(state)
    if best is None:
        figure = "held-out loss" if state.best_by == "loss" else "probe"
        raise UserError(
            f"no checkpoint of {url} has a {figure}, so none is the best: use the newest, or name a checkpoint"
        )
    return load_checkpoint(ledger.url(best)), f"best by {state.best_by}"


def _is_best_by_probe(url: str) -> bool:
    """Whether the checkpoint in this folder is the best of its run, chosen by a probe."""
    run_dir, _, folder = storage.absolute(url).rpartition("/checkpoints/")
    if not run_dir:
        return False
    state = Ledger(run_dir).head()
    best = Probes(run_dir).best(state) if state.best_by == "probe" else None
    return best is not None and best.folder == folder
