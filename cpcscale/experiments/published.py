"""A saved recogniser or encoder as it is logged and registered in MLflow: what it says of itself, where it is from."""

from __future__ import annotations

import re
from typing import Any

from cpcscale import __version__, storage
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError
from cpcscale.runs import checkpoint_files
from cpcscale.runs.checkpoint_files import STATE, TENSORS
from cpcscale.serve.card import LICENCE_MARKS
from cpcscale.serve.folder import FOLDER, SavedRecogniser, load_recogniser
from cpcscale.serve.recogniser import Recogniser
from cpcscale.serve.table import TEXTS
from cpcscale.storage.marked_folder import content_digest
from cpcscale.tracking import run_note
from cpcscale.tracking.model_folder import TrackedModel
from cpcscale.tracking.registry import opened, register
from cpcscale.tracking.store import TrackingConfig
from cpcscale.train.checkpoint import is_pretraining, load_encoder

# What `predict` and `encode` import, of all that cpcscale requires; an environment for it needs no Ray.
PACKAGES = (
    *("torch", "numpy", "scipy", "scikit-learn", "safetensors", "soundfile", "soxr", "kaldi-native-fbank", "pyarrow"),
    "onnxruntime",
    *("fsspec", "s3fs", "omegaconf", "pyyaml", "psutil", "tqdm", "xxhash"),
)
# What is told of a pretrained encoder.
_TOLD = ("fingerprint", "step")
# What features of a kind need besides.
_PACKAGE_OF = {"hf": "transformers", "egemaps": "opensmile"}


def tracked_model(url: str, name: str, saved: SavedRecogniser) -> TrackedModel:
    """The recogniser saved in the folder `url`, as MLflow is to have it under `name`."""
    fitted, scores = saved.fitted, saved.scores
    digests, described = scores["digests"], fitted.description()["features"]
    kinds = {part[key] for part in described.get("parts", [described]) for key in ("kind", "which") if key in part}
    return TrackedModel(
        name=name,
        url=url,
        files=(*FOLDER.read_marker(url),),
        digest=content_digest(url),
        tags={
            **{f"cpcscale.{key}": str(scores[key]) for key in ("system", "corpus", "protocol")},
            "cpcscale.marks": ",".join(scores["marks"]),
            "cpcscale.scale": "{:g} to {:g}".format(*fitted.scale),
            "cpcscale.ccc_mean": repr(float(scores["ccc"]["mean"])),
            **{f"cpcscale.{key}_hash": str(value) for key, value in digests.items()},
            **{f"cpcscale.encoder_{key}": str(scores["encoder"][key]) for key in _TOLD if key in scores["encoder"]},
            "cpcscale.version": str(scores["versions"]["cpcscale"]),
        },
        scores={f"ccc_{key}": float(scores["ccc"][key]) for key in (*PRIMITIVES, "mean")},
        corpus=(str(scores["corpus"]), str(digests["corpus"])),
        packages=(*PACKAGES, *(name for kind, name in _PACKAGE_OF.items() if kind in kinds)),
        columns={name: "string" if name in TEXTS else "double" for name in Recogniser(saved).columns},
        training_rows=fitted.training_rows,
        limits=tuple(mark for mark in scores["marks"] if mark in LICENCE_MARKS),
    )


def tracked_encoder(url: str) -> TrackedModel:
    """The encoder of a pretraining, of its newest checkpoint, or of the checkpoint in the folder `url`.

    Its files are the network, the running mean of its weights where the run has one, and the state of the run: with
    these it is a checkpoint, without the optimiser. Raises UserError where there is none.
    """
    network, source = load_encoder(url)
    files, state = checkpoint_files.read_marker(source["url"]), checkpoint_files.read_state(source["url"])
    # As `load_encoder` chooses them.
    weights = next(name for name in (f"ema{TENSORS}", f"model{TENSORS}") if name in files)
    return TrackedModel(
        name="encoder",
        url=source["url"],
        files=(weights, STATE),
        digest=content_digest(source["url"]),
        tags={
            "cpcscale.fingerprint": str(source["fingerprint"]),
            "cpcscale.step": str(source["step"]),
            "cpcscale.audio_s": repr(float(source["audio_s"])),
            "cpcscale.chosen": source["chosen"],
            "cpcscale.config_hash": str(state["config_hash"]),
            "cpcscale.encoder": network.kind,
            "cpcscale.version": __version__,
        },
        packages=PACKAGES,
        columns={"seconds": "double", "vector": "doubles", "reason": "string"},
        kind="encoder",
        chosen=source["chosen"],
    )


def register_model(
    url: str, name: str, alias: str, *, share_training_rows: bool, accept_licence: bool, force: bool
) -> dict[str, Any]:
    """Registers the recogniser or encoder in the folder `url`, as `tracking.registry.register` does and returns.

    Also a released recogniser, by its name. In the experiment of its run, if the folder is that of a run. Raises
    UserError where there is none, where it holds rows of training data that may not be shared or that limit its use,
    and for an alias that would move to a worse one.
    """
    if url.startswith("models:/"):
        raise UserError(
            f"{url} is registered already: name the folder of a recogniser, such as RUN_DIR/recogniser, or the run_dir "
            "of a pretraining"
        )
    with opened(url) as place:
        if is_pretraining(place):
            model = tracked_encoder(place)
        else:
            model = _tracked_recogniser(place, share_training_rows=share_training_rows, accept_licence=accept_licence)
        run_dir = re.sub(r"/(recogniser(/fold-\d+)?|checkpoints/[^/]+)?/?$", "", storage.absolute(place))
        run = run_note.read(run_dir)
        tracking = TrackingConfig(experiment=str(run.get("experiment") or TrackingConfig.experiment))
        return register(tracking, model, name, alias, force=force)


def _tracked_recogniser(url: str, *, share_training_rows: bool, accept_licence: bool) -> TrackedModel:
    saved = load_recogniser(url)
    if (rows := saved.fitted.training_rows) and not share_training_rows:
        raise UserError(
            f"{url} holds {rows} rows of its training data as support vectors: pass --share-training-rows if all who "
            "read the store may have them, or fit head=ridge or head=attention, which hold none"
        )
    model = tracked_model(url, "recogniser", saved)
    if model.limits and not accept_licence:
        raise UserError(
            f"{url} is marked {' and '.join(model.limits)} (its README.md lists the licences): pass --accept-licence "
            "if all who read the store may use it so"
        )
    return model
