"""A saved recogniser: a folder with its description, its arrays, its scores and a card.

    config.json         what it is, in plain values: all that it is made again from, with the arrays
    model.safetensors   the arrays: encoder, head, what it standardises by; support vectors as float64
    scores.json         where its figures come from: protocol, CCC with intervals, marks, digests, versions
    README.md           the model card
    COMPLETE.json       size and sha256 of each, written last

Nothing in it is code, and nothing is unpickled. The folder alone is enough to apply the recogniser.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cpcscale import config, storage
from cpcscale.emotion.fitted import FittedRecogniser, fitted_from
from cpcscale.errors import UserError
from cpcscale.storage.marked_folder import MARKER, FolderFormat, TornError

CONFIG, MODEL, SCORES, CARD = "config.json", "model.safetensors", "scores.json", "README.md"
FOLDER = FolderFormat("recogniser", 1, CONFIG, re.compile(r"[A-Za-z][A-Za-z0-9_]*\.(safetensors|json|md)"))


def save_recogniser(url: str, recogniser: FittedRecogniser, scores: Mapping[str, Any], card: str) -> None:
    """Writes the folder `url`, its marker last. What is there of another recogniser is removed first."""
    if is_recogniser(url):
        storage.remove(storage.join(url, MARKER))
    arrays = {name: np.array(array, order="C") for name, array in recogniser.arrays().items()}
    contents = {
        CONFIG: _json(recogniser.description()),
        MODEL: save(arrays),
        SCORES: _json(scores),
        CARD: card.encode(),
    }
    FOLDER.write(url, contents)


def is_recogniser(url: str) -> bool:
    """Whether the folder `url` was written to its end."""
    return storage.exists(storage.join(url, MARKER))


def load_recogniser(url: str) -> tuple[FittedRecogniser, dict[str, Any]]:
    """(the recogniser in the folder `url`, its scores). Each file is checked against the marker.

    Raises UserError where there is none, for a folder that is torn or changed, and for a newer format.
    """
    files = _whole(url)
    try:
        description, scores = config.read_json(files[CONFIG]), config.read_json(files[SCORES])
        return fitted_from(description, load(files[MODEL])), dict(scores)
    except UserError as error:
        raise UserError(f"{url}: {error}") from None
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{url} is no recogniser ({type(error).__name__}): fit it again") from None


def recogniser_digest(url: str) -> str:
    """sha256 of the marker of the folder `url`, which lists the hash of each file: it names exactly this recogniser."""
    return hashlib.sha256(storage.read(storage.join(url, MARKER))).hexdigest()


def describe_recogniser(url: str) -> dict[str, Any]:
    """What `cpcscale recogniser show` says of the folder `url`."""
    fitted, scores = load_recogniser(url)
    return {
        "path": storage.absolute(url),
        "digest": recogniser_digest(url),
        "system": fitted.system,
        "head": fitted.head.description()["kind"],
        "scale": list(fitted.scale),
        "parameters": sum(array.size for array in fitted.arrays().values()),
        "bytes": sum(file.bytes for file in FOLDER.read_marker(url).values()),
        "scores": scores,
    }


def verify_recogniser(url: str) -> dict[str, Any]:
    """What `cpcscale recogniser verify` says: whether each byte is as it was written. UserError where there is none."""
    if not is_recogniser(url):
        _whole(url)
    problems = list(FOLDER.find_problems(url, every_byte=True))
    return {"path": storage.absolute(url), "ok": not problems, "problems": problems}


def _whole(url: str) -> dict[str, bytes]:
    """The files of the folder. Raises UserError with the way out for what is none."""
    try:
        return FOLDER.read_files(url)
    except TornError as error:
        if is_recogniser(url):
            raise UserError(f"{error}: copy it again, or fit it again") from None
    below = storage.join(url, "recogniser")
    if is_recogniser(below):
        raise UserError(f"{url} is the folder of a run, and its recogniser is in it: name {below}")
    if storage.exists(storage.join(url, "result.json")):
        raise UserError(
            f"{url} is a run that kept no recogniser: run `cpcscale finetune CONFIG publish=final run_dir={url}` to "
            "have one"
        )
    raise UserError(f"no recogniser at {url}: name the folder of one, such as RUN_DIR/recogniser")


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
