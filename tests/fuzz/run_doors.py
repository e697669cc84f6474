"""Damaged configs, files of a run, and recognisers, against every verb that reads a config, `checkpoint`, `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import torch
import trees
from safetensors.numpy import save

import cpcscale
from cpcscale import config
from cpcscale.cluster.audit import AuditConfig
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.emotion.corpora.corpus import CorpusConfig
from cpcscale.emotion.fitted import FittedClassifier, FittedRecogniser, NetworkHead, VectorHead
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig
from cpcscale.emotion.heads.svm import SupportClasses, SupportVectors
from cpcscale.emotion.held_out import HeldOut, Reference
from cpcscale.emotion.systems import SYSTEMS
from cpcscale.experiments.evaluate.config import EvaluateConfig
from cpcscale.experiments.finetune import FinetuneConfig
from cpcscale.experiments.sweep.config import SweepConfig
from cpcscale.report.terminal import checkpoints as report
from cpcscale.runs import inspect
from cpcscale.runs.probe_log import Probe, Probes, ProbeSet
from cpcscale.serve.folder import CONFIG, FOLDER, MODEL, RESIDUALS, SCORES
from cpcscale.shards.adoption.read_tar import IndexConfig
from cpcscale.shards.pack import PackConfig
from cpcscale.train.checkpoint import load_encoder
from cpcscale.train.recipe import Recipe
from fuzz.doors import Door, Folder, WrongSuccess, emptied

_CONFIGS = Path(__file__).parents[2] / "configs"
_ROOTS: dict[str, Any] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "sweep": SweepConfig,
    "evaluate": EvaluateConfig,
}
_OVERRIDES: dict[str, tuple[Any, str]] = {
    "pretrain": (Recipe, "train.steps=60\nmodel.size=small\nwindow.seconds=1.28\nseed=1"),
    "pack": (
        PackConfig,
        "codec=flac\nunseen_groups=[a, b]\nmax_s=30.0\nlimits.rate_hz=[8000,48000]\ncolumns.path=file",
    ),
    "index": (IndexConfig, "pattern=*.tar\ncolumns.group=a.b\nlevel_share=0.5\ngroup_folder=-1"),
    "corpus": (CorpusConfig, "kind=csv\nscale=[1,7]\nname=007\non_bad=skip"),
    "audit": (AuditConfig, "share=0.5\nlanes=8\nbatch=16\nwindow.seconds=1.28"),
}


def doors(scratch: Path) -> list[Door]:
    """Config files, overrides, and a run with two checkpoints, probes and a ledger."""
    names = ("pretrain.quickstart", "pretrain.paper", "finetune.emodb", "sweep.recipe", "evaluate.learning")
    files = {f"{name}.yaml": (_CONFIGS / f"{name.replace('.', '/')}.yaml").read_bytes() for name in names}
    overrides = {name: text.encode() for name, (_, text) in _OVERRIDES.items()}
    run = _Run(scratch / "run")
    return [
        Door("config", files, _ConfigFile(emptied(scratch / "config")).enter, text=True, weight=0.6),
        Door("overrides", overrides, _overrides, text=True),
        Door("run", run.folder.files, run.enter, weight=2),
        Door("recogniser", saved_recogniser(), _Saved(emptied(scratch / "recogniser")).enter, weight=2),
    ]


class _ConfigFile:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def enter(self, target: str, data: bytes, done: str) -> bool:
        path = self._folder / target
        path.write_bytes(data)
        _check(config.load(_ROOTS[target.partition(".")[0]], str(path)))
        return True


def _overrides(target: str, data: bytes, done: str) -> bool:
    _check(config.load(_OVERRIDES[target][0], None, data.decode(errors="surrogateescape").split("\n")))
    return True


def _check(spec: Any) -> None:
    """What a run does with its config."""
    config.digest(spec)
    config.flat(spec)
    again = json.loads(json.dumps(config.to_dict(spec)))
    # Secrets are not stored.
    if "***" not in json.dumps(again) and config.digest(config.build(type(spec), again)) != config.digest(spec):
        raise WrongSuccess("what is stored of the config makes another config")


class _Run:
    def __init__(self, run: Path) -> None:
        emptied(run)
        for step in (10, 20):
            where = checkpoints.position(step, metrics={"heldout_loss": 1.0 / step}, audio_s=3.0)
            checkpoints.publish(run, where)
        probes = Probes(str(run))
        probes.write_set(ProbeSet(corpus="a", corpus_digest="d", speakers=["s"], marks=[], settings={}, stride=10))
        folders = sorted(path.name for path in (run / "checkpoints").iterdir())
        for number, folder in enumerate(folders):
            ccc = {"mean": 0.1 * number, "valence": 0.1, "activation": 0.1, "dominance": 0.1}
            probes.write(Probe(folder=folder, step=10 * (number + 1), status="done", ccc=ccc))
        self._run, self.folder = str(run), Folder(run)
        self._weights = {folder: _weights(f"{run}/checkpoints/{folder}") for folder in folders}

    def enter(self, target: str, data: bytes, done: str) -> bool:
        self.folder.put(target, data)
        list(report.list_lines(inspect.list_checkpoints(self._run)))
        found = inspect.verify_checkpoints(self._run)
        list(report.verify_lines(found))
        # Another marker of the same files is right.
        changed = target.startswith("checkpoints/") and data != self.folder.files[target]
        if found["ok"] and changed and not target.endswith("COMPLETE.json"):
            raise WrongSuccess("verify finds no problem in a file that was changed")
        list(report.show_lines(inspect.describe_checkpoint(self._run)))
        for which in ("newest", "best"):
            model, facts = load_encoder(self._run, which)
            folder = facts["url"].rpartition("/")[2]
            same = _equal(model.state_dict(), self._weights[folder])
            if not same or facts["step"] != int(folder.split("-")[1]):
                raise WrongSuccess(f"{which} loads other weights than those of {folder}")
        return bool(found["ok"])


def saved_recogniser() -> dict[str, bytes]:
    """The files of two recognisers whose arrays say what shape they have: a network on frames of MFCCs, vectors."""
    torch.manual_seed(0)
    head = AttentionHead(AttentionHeadConfig(heads=2, hidden=4, dense=4), 40)
    network = FittedRecogniser("mfcc", SYSTEMS["mfcc"].features(), NetworkHead(head), 10.0, (1.0, 5.0))
    parts = [np.full(shape, 0.5) for shape in ((66,), (66,), (3, 66), ())]
    one = SupportVectors(*parts, np.full(3, 0.5), np.array(0.5))
    classes = SupportClasses(*parts, np.array([0, 1, 2]), np.full((2, 3), 0.5), np.full(3, 0.5))
    vectors = FittedRecogniser(
        "functionals",
        SYSTEMS["functionals"].features(),
        VectorHead("svr", (one,) * 3),
        10.0,
        (1.0, 5.0),
        Reference(*parts[:2]),
        FittedClassifier(classes, ("a", "b", "c")),
    )
    found = {}
    for name, made in (("network", network), ("vectors", vectors)):
        found[f"{name}.json"] = json.dumps(made.description()).encode()
        found[f"{name}.safetensors"] = save(made.arrays())
    errors = np.linspace(-0.5, 0.5, 30, dtype=np.float32).reshape(10, 3)
    held_out = HeldOut.of(errors, errors * 2, np.arange(10.0), [f"speaker {row // 2}" for row in range(10)], 0)
    assert held_out is not None
    found["residuals.safetensors"] = save(held_out.arrays())
    return found


class _Saved:
    """A recogniser whose marker is right for what was damaged: what is inside must say whether it can be used."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, saved_recogniser()
        self._wave = trees.noise(0.5, 3)

    def enter(self, target: str, data: bytes, done: str) -> bool:
        files = self._files | {target: data}
        name = target.partition(".")[0].replace("residuals", "vectors")
        contents = {CONFIG: files[f"{name}.json"], MODEL: files[f"{name}.safetensors"], SCORES: b"{}"}
        contents[RESIDUALS] = files[RESIDUALS]
        FOLDER.write(str(emptied(self._folder)), contents)
        found = cpcscale.load(self._folder).predict(self._wave, 16_000)
        if not np.isfinite(found.unit).all():
            raise WrongSuccess(f"it was loaded and says {found.unit}")
        if not all(low <= high for low, high in zip(found.low, found.high, strict=True)):
            raise WrongSuccess(f"it was loaded and says from {found.low} to {found.high}")
        return True


def _weights(url: str) -> dict[str, torch.Tensor]:
    return dict(load_encoder(url)[0].state_dict())


def _equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
