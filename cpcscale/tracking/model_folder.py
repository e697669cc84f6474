"""A recogniser or an encoder as MLflow keeps one: its saved folder, with what MLflow needs to show, load and serve it.

MLmodel             what it takes and gives, and how it is loaded
model.py            the code that loads it, a copy of served_model.py: nothing is pickled
recogniser/         the saved folder as it is; of an encoder encoder/, its checkpoint without what only training needs
requirements.txt    what it runs on, and the wheel of cpcscale, which lies beside it
python_env.yaml     the same for the environments that MLflow makes
input_example.json, serving_input_example.json: made sound, nobody's voice
"""

from __future__ import annotations

import array
import base64
import hashlib
import io
import json
import math
import platform
import wave
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from cpcscale import storage
from cpcscale.config import redact
from cpcscale.errors import UserError
from cpcscale.storage.marked_folder import MARKER
from cpcscale.tracking.wheel import own_wheel

CODE = "model.py"
_EXAMPLE, _SERVED_EXAMPLE = "input_example.json", "serving_input_example.json"
_RATE_HZ = 8000


@dataclass(frozen=True)
class TrackedModel:
    """A saved recogniser or encoder as it is logged, in plain values."""

    # Its name in the run: recogniser, recogniser-fold-0, encoder.
    name: str
    # The saved folder, those of its files that are logged, and the sha256 of its marker.
    url: str
    files: tuple[str, ...]
    digest: str
    # Where it comes from, and what it needs to be compared by.
    tags: dict[str, str]
    # Packages that it runs on.
    packages: tuple[str, ...]
    # What it gives for a file: {name: string, double or doubles}.
    columns: dict[str, str]
    # The figures of the procedure that made a recogniser, and the corpus that they are of: (name, digest).
    scores: dict[str, float] = field(default_factory=dict)
    corpus: tuple[str, str] = ("", "")
    # Rows of training data in it, as a support vector machine holds them.
    training_rows: int = 0
    # The marks of licences that limit what it may be used for.
    limits: tuple[str, ...] = ()
    # recogniser or encoder, which is the name of its folder in the model too.
    kind: str = "recogniser"
    # How the checkpoint of an encoder was chosen, which its copy has to know: it lies beside no run that could tell.
    chosen: str = ""


def write_model_folder(folder: Path, model: TrackedModel, *, run_id: str | None, model_id: str) -> None:
    """Writes the model into the empty `folder`. Raises UserError when its saved folder is another one by now."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    _copy(model, folder / model.kind)
    (folder / CODE).write_bytes(Path(__file__).with_name("served_model.py").read_bytes())
    wheel, data = own_wheel()
    (folder / wheel).write_bytes(data)
    # Without the local part of a version, such as +cu128: no index has it.
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", *model.packages)]
    (folder / "requirements.txt").write_text("\n".join([*pinned, f"./{wheel}"]) + "\n")
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(json.dumps(environment) + "\n")
    example = {"columns": ["audio"], "data": [[base64.b64encode(_made_sound()).decode()]]}
    (folder / _EXAMPLE).write_text(json.dumps(example))
    (folder / _SERVED_EXAMPLE).write_text(json.dumps({"dataframe_split": example}))
    described = Model(
        run_id=run_id,
        model_id=model_id,
        signature=ModelSignature(
            Schema([ColSpec("binary", "audio")]),
            Schema(
                [
                    ColSpec(Array(DataType.double) if kind == "doubles" else kind, name, required=False)
                    for name, kind in model.columns.items()
                ]
            ),
        ),
        saved_input_example_info={
            "artifact_path": _EXAMPLE,
            "serving_input_path": _SERVED_EXAMPLE,
            "type": "dataframe",
            "pandas_orient": "split",
        },
    )
    pyfunc.add_to_model(
        described,
        loader_module="mlflow.pyfunc.loaders.code_model",
        model_code_path=CODE,
        python_env="python_env.yaml",
        artifacts={model.kind: {"path": model.kind, "uri": redact(model.url)}},
        streamable=False,
    )
    described.save(str(folder / "MLmodel"))


def _copy(model: TrackedModel, folder: Path) -> None:
    """Copies the files of the model, and a marker that lists these."""
    marker = storage.read(storage.join(model.url, MARKER))
    if hashlib.sha256(marker).hexdigest() != model.digest:
        raise UserError(f"{model.url} holds another {model.kind} than it did")
    folder.mkdir()
    for name in model.files:
        (folder / name).write_bytes(storage.read(storage.join(model.url, name)))
    listed = json.loads(marker)
    kept = {name: listed["files"][name] for name in model.files}
    if model.chosen or kept != listed["files"]:
        marker = json.dumps({**listed, "files": kept, "chosen": model.chosen}, indent=1).encode()
    (folder / MARKER).write_bytes(marker)


def _made_sound() -> bytes:
    """A WAV file: half a second of a tone that comes and goes."""
    times = [place / _RATE_HZ for place in range(_RATE_HZ // 2)]
    levels = [(1 - math.cos(2 * math.pi * 6 * t)) * math.sin(2 * math.pi * 220 * t) for t in times]
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE_HZ)
        file.writeframes(array.array("h", (round(9000 * level) for level in levels)).tobytes())
    return out.getvalue()
