"""A saved recogniser as it is logged and registered in MLflow: what it says of itself, and where it comes from."""

from __future__ import annotations

import re
from typing import Any

from cpcscale import storage
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError
from cpcscale.serve.card import LICENCE_MARKS
from cpcscale.serve.folder import FOLDER, SavedRecogniser, load_recogniser, recogniser_digest
from cpcscale.serve.recogniser import COLUMNS
from cpcscale.serve.table import TEXTS
from cpcscale.storage.marked_folder import MARKER
from cpcscale.tracking import run_note
from cpcscale.tracking.model_folder import TrackedModel
from cpcscale.tracking.registry import register
from cpcscale.tracking.store import TrackingConfig

# What `predict` imports, of all that cpcscale requires; an environment for it needs no Ray.
PACKAGES = (
    *("torch", "numpy", "scipy", "scikit-learn", "safetensors", "soundfile", "soxr", "kaldi-native-fbank", "pyarrow"),
    "onnxruntime",
    *("fsspec", "s3fs", "omegaconf", "pyyaml", "psutil", "tqdm", "xxhash"),
)


def tracked_model(url: str, name: str, saved: SavedRecogniser) -> TrackedModel:
    """The recogniser saved in the folder `url`, as MLflow is to have it under `name`."""
    fitted, scores = saved.fitted, saved.scores
    digests, kind = scores["digests"], fitted.description()["features"]["kind"]
    return TrackedModel(
        name=name,
        url=url,
        files=(*FOLDER.read_marker(url), MARKER),
        digest=recogniser_digest(url),
        tags={
            **{f"cpcscale.{key}": str(scores[key]) for key in ("system", "corpus", "protocol")},
            "cpcscale.marks": ",".join(scores["marks"]),
            "cpcscale.scale": "{:g} to {:g}".format(*fitted.scale),
            "cpcscale.ccc_mean": repr(float(scores["ccc"]["mean"])),
            **{f"cpcscale.{key}_hash": str(value) for key, value in digests.items()},
            **{f"cpcscale.encoder_{key}": str(value) for key, value in scores["encoder"].items()},
            "cpcscale.version": str(scores["versions"]["cpcscale"]),
        },
        scores={f"ccc_{key}": float(scores["ccc"][key]) for key in (*PRIMITIVES, "mean")},
        corpus=(str(scores["corpus"]), str(digests["corpus"])),
        packages=(*PACKAGES, *(["transformers"] if kind == "hf" else [])),
        columns={column: "string" if column in TEXTS else "double" for column in COLUMNS},
        training_rows=fitted.training_rows,
        limits=tuple(mark for mark in scores["marks"] if mark in LICENCE_MARKS),
    )


def register_recogniser(
    url: str, name: str, alias: str, *, share_training_rows: bool, accept_licence: bool, force: bool
) -> dict[str, Any]:
    """Registers the recogniser in the folder `url`, as `tracking.registry.register` does, and returns what it returns.

    In the experiment of its run, if the folder is that of a run. Raises UserError where there is none, where it holds
    rows of training data that may not be shared or that limit its use, and for an alias that would move to a worse one.
    """
    if url.startswith("models:/"):
        raise UserError(f"{url} is registered already: name the folder of a recogniser, such as RUN_DIR/recogniser")
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
    run_dir = re.sub(r"/recogniser(/fold-\d+)?/?$", "", storage.absolute(url))
    run = run_note.read(run_dir)
    tracking = TrackingConfig(experiment=str(run.get("experiment") or TrackingConfig.experiment))
    return register(tracking, model, name, alias, force=force)
