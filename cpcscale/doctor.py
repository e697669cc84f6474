"""`cpcscale doctor`: what this machine, its cluster, store and tracker can do, and the way out where they cannot."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpcscale import config as configs
from cpcscale import machine, storage
from cpcscale.cluster import session
from cpcscale.errors import UserError
from cpcscale.storage.place import check_place
from cpcscale.storage.s3_requests import StorageConfig
from cpcscale.tracking import store
from cpcscale.tracking.store import TrackingConfig

_LEAST_FREE_GB = 1.0
_LEAST_MEMORY_GB = 2.0
# Stores refuse requests whose time is 15 minutes from theirs.
_LARGEST_SKEW_S = 300.0


@dataclass(kw_only=True)
class DoctorConfig:
    """What `cpcscale doctor` tries when it is given no config of another verb."""

    # Folder (or s3:// prefix) for runs.
    run_dir: str = "runs"
    # How requests to an object store are repeated.
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True)
class Finding:
    """What was found of one thing: a line of text, with the way out if it is not `ok`."""

    name: str
    ok: bool
    text: str


def load(path: str | None, overrides: list[str]) -> Any:
    """The config at `path` as that of the verb whose keys it has; a DoctorConfig without a path.

    Raises UserError for a config that no verb takes.
    """
    if path is None:
        return configs.load(DoctorConfig, None, overrides)
    from cpcscale.cluster.pretrain_config import PretrainConfig
    from cpcscale.experiments.evaluate.config import EvaluateConfig
    from cpcscale.experiments.finetune import FinetuneConfig
    from cpcscale.experiments.many_runs_config import ReproduceConfig
    from cpcscale.experiments.sweep.config import SweepConfig

    roots = (PretrainConfig, FinetuneConfig, SweepConfig, EvaluateConfig, ReproduceConfig)
    return configs.load_any(roots, path, overrides)


def examine(spec: Any) -> Iterator[Finding]:
    """Tries everything that a verb with this config rests on, one thing after the other; a few seconds in all."""
    if hasattr(spec, "storage"):
        storage.configure(spec.storage)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("cores", _cores),
        ("memory", _memory),
        ("temporary", _temporary),
        ("audio", _audio),
        ("versions", _versions),
        ("GPU", lambda: _gpu(spec)),
        ("Ray", _ray),
        ("run_dir", lambda: _run_dir(spec.run_dir)),
        ("MLflow", lambda: _mlflow(spec.tracking)),
        ("cache", lambda: _cache(spec)),
    ]
    for name, check in checks:
        try:
            yield Finding(name, True, check())
        except UserError as error:
            yield Finding(name, False, str(error))


def _cores() -> str:
    there, usable = os.cpu_count() or 1, machine.usable_cores()
    given = "" if there == usable else f" of {there}: the others are not this process's (taskset, cgroup, SLURM)"
    return f"{usable}{given}"


def _memory() -> str:
    usable = machine.usable_memory() / 1e9
    if usable < _LEAST_MEMORY_GB:
        raise UserError(f"{usable:.1f} GB, of which Ray and PyTorch alone take {_LEAST_MEMORY_GB:g}: give it more")
    return f"{usable:.0f} GB"


def _temporary() -> str:
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        raise UserError(f"no temporary folder can be written ({error}): set TMPDIR to one") from None
    return f"{folder}, {_free(Path(folder), 'set TMPDIR to a folder on another disk')}"


def _audio() -> str:
    import soundfile

    known = soundfile.available_formats()
    if lacks := {"WAV", "FLAC", "OGG", "MP3"} - known.keys():
        raise UserError(
            f"libsndfile {soundfile.__libsndfile_version__} cannot read {', '.join(sorted(lacks))}: it is the "
            "system's, and old; `pip install --force-reinstall soundfile` brings a newer one"
        )
    return f"libsndfile {soundfile.__libsndfile_version__} reads WAV, FLAC, Ogg, Opus and MP3"


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in session.versions().items())


def _gpu(spec: Any) -> str:
    import torch

    asked = getattr(getattr(spec, "train", None), "precision", "fp32")
    if torch.cuda.is_available():
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
        fast = "bf16 and fp16" if torch.cuda.is_bf16_supported() else "fp16"
        return f"{count} x {name}; networks train in fp32, or faster in {fast}"
    if Path("/dev/nvidia0").exists():
        raise UserError(f"there is one, and PyTorch {torch.__version__} cannot use it: install the build for its CUDA")
    if asked == "fp16":
        raise UserError("none, and train.precision=fp16 needs one: use fp32")
    return "none: networks train on the cores"


def _ray() -> str:
    began = time.monotonic()
    with session.connected(1):
        nodes = session.live_nodes()
        cores, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    took = _since(began)
    if session.joins_cluster():
        where = f"joined {os.environ['RAY_ADDRESS']} and left again in {took}: {len(nodes)} nodes"
    else:
        where = f"started and ended here in {took}"
    return f"{where}, {cores:g} cores, {gpus:g} GPUs"


def _run_dir(run_dir: str) -> str:
    place = check_place(run_dir)
    text = f"{storage.shown(run_dir)}: written, read, listed and created once in {place.seconds:.2f} s"
    if place.clock_s is not None and abs(place.clock_s) > _LARGEST_SKEW_S:
        raise UserError(f"{text}, but this machine's clock is {place.clock_s:+.0f} s from the store's: set it")
    clock = "" if place.clock_s is None else f"; this clock {place.clock_s:+.0f} s from its own"
    return text + ("" if place.locks else "; without locks, so keep caches elsewhere") + clock


def _mlflow(tracking: TrackingConfig) -> str:
    began = time.monotonic()
    store.check_store(tracking)
    return f"{configs.redact(store.store_uri(tracking))}: values and files written and read in {_since(began)}"


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"


def _cache(spec: Any) -> str:
    if hasattr(spec, "feed"):
        folder, limit_gb, key = spec.feed.cache.path, spec.feed.cache.max_gb, "feed.cache.folder"
    elif hasattr(spec, "audio_cache"):
        folder, limit_gb, key = spec.audio_cache.folder, spec.audio_cache.limit_gb, "audio_cache.path"
    else:
        folder, limit_gb, key = machine.cache_folder() / "cpcscale", 0.0, "XDG_CACHE_HOME"
    grows = f"; it may take {limit_gb:g} GB" if limit_gb else ""
    return f"{folder}, {_free(folder, f'set {key} to a folder on another disk')}{grows}"


def _free(folder: Path, way_out: str) -> str:
    """How much room a folder has, or would have. Raises UserError when that is next to nothing, or not writable."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{there} is no folder that can be written: {way_out}")
    free_gb = shutil.disk_usage(there).free / 1e9
    if free_gb < _LEAST_FREE_GB:
        raise UserError(f"{folder} has {free_gb:.1f} GB left: {way_out}")
    return f"{free_gb:.0f} GB free"
