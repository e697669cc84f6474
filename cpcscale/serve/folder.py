"""A saved recogniser: a folder with its description, its arrays, its scores and a card.

    config.json         what it is, in plain values: all that it is made again from, with the arrays
    model.safetensors   the arrays: encoder, head, what it standardises by; support vectors as float64
    residuals.safetensors  sizes of errors on held-out speakers, on which intervals rest; absent where there are none
    scores.json         where its figures come from: protocol, CCC with intervals, marks, digests, versions
    README.md           the model card, made of the others
    COMPLETE.json       size and sha256 of each, written last

Nothing in it is code, and nothing is unpickled. The folder alone is enough to apply the recogniser.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cpcscale import config, storage
from cpcscale.emotion.encoders.networks import is_network
from cpcscale.emotion.encoders.of_recogniser import CONFIG, FOLDER, MODEL, SCORES
from cpcscale.emotion.fitted import FittedRecogniser, fitted_from
from cpcscale.emotion.held_out import HeldOut
from cpcscale.errors import UserError
from cpcscale.serve.card import card, intervals
from cpcscale.storage.marked_folder import MARKER, TornError, content_digest

CARD, RESIDUALS = "README.md", "residuals.safetensors"


@dataclass(frozen=True)
class SavedRecogniser:
    """What a folder holds: a recogniser, the content of scores.json, and what its intervals rest on, if they can.

    `digest` is the `content_digest` of the folder: it names exactly this recogniser.
    """

    fitted: FittedRecogniser
    scores: Mapping[str, Any]
    held_out: HeldOut | None = None
    digest: str = ""


def save_recogniser(url: str, saved: SavedRecogniser) -> None:
    """Writes the folder `url`, its marker last. What is there of another recogniser is removed first."""
    if is_recogniser(url):
        storage.remove(storage.join(url, MARKER))
    contents = {
        CONFIG: _json(saved.fitted.description()),
        MODEL: _tensors(saved.fitted.arrays()),
        SCORES: _json(saved.scores),
        CARD: card(saved.scores, intervals(saved.held_out, saved.fitted.scale)).encode(),
    }
    if saved.held_out is not None:
        contents[RESIDUALS] = _tensors(saved.held_out.arrays())
    FOLDER.write(url, contents)


def is_free_for(target: str, url: str) -> bool:
    """Whether the recogniser `url`, which may not be there yet, may be copied to `target`; False: it is there already.

    Raises UserError where another one stands, or anything else.
    """
    if not is_taken(target):
        return True
    if is_recogniser(target) and is_recogniser(url) and FOLDER.read_marker(target) == FOLDER.read_marker(url):
        return False
    what = "another recogniser" if is_recogniser(target) else "other files"
    raise UserError(f"{target} holds {what}: remove it, or name another folder")


def copy_recogniser(url: str, target: str) -> None:
    """Copies the folder `url` to `target`, its marker last. Raises UserError as `is_free_for` does."""
    files = read_recogniser(url)
    if is_free_for(target, url):
        FOLDER.write(target, files)


def is_recogniser(url: str) -> bool:
    """Whether the folder `url` was written to its end."""
    return storage.exists(storage.join(url, MARKER))


def is_taken(url: str) -> bool:
    """Whether there is a file at `url`, or a folder with any."""
    if not storage.exists(url):
        return False
    try:
        return bool(storage.list_files(url))
    except storage.NotFoundError:
        return True


def load_recogniser(url: str) -> SavedRecogniser:
    """The recogniser in the folder `url`. Each file is checked against the marker.

    Raises UserError where there is none, for a folder that is torn or changed, and for a newer format.
    """
    return recogniser_of(url, read_recogniser(url), content_digest(url))


def recogniser_of(url: str, files: Mapping[str, bytes], digest: str) -> SavedRecogniser:
    """That of these files of the folder `url`, which has this digest. Raises UserError as `load_recogniser`."""
    try:
        description, scores = config.read_json(files[CONFIG]), config.read_json(files[SCORES])
        held_out = HeldOut.from_arrays(load(files[RESIDUALS])) if RESIDUALS in files else None
        fitted = fitted_from(description, load(files[MODEL]))
        return SavedRecogniser(fitted, dict(scores), held_out, digest)
    except UserError as error:
        raise UserError(f"{url}: {error}") from None
    except (KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{url} is no recogniser ({type(error).__name__}): fit it again") from None


def describe_recogniser(url: str) -> dict[str, Any]:
    """What `cpcscale recogniser show` says of the folder `url`."""
    saved = load_recogniser(url)
    fitted = saved.fitted
    return {
        "path": storage.absolute(url),
        "digest": saved.digest,
        "system": fitted.system,
        "head": fitted.head.description()["kind"],
        "scale": list(fitted.scale),
        "classes": list(fitted.classifier.classes) if fitted.classifier is not None else [],
        "parameters": sum(array.size for array in fitted.arrays().values()),
        "bytes": sum(file.bytes for file in FOLDER.read_marker(url).values()),
        "intervals": intervals(saved.held_out, fitted.scale),
        "scores": saved.scores,
    }


def verify_recogniser(url: str) -> dict[str, Any]:
    """What `cpcscale recogniser verify` says: whether each byte is as it was written. UserError where there is none."""
    if not is_recogniser(url):
        read_recogniser(url)
    problems = list(FOLDER.find_problems(url, every_byte=True))
    return {"path": storage.absolute(url), "ok": not problems, "problems": problems}


def read_recogniser(url: str) -> dict[str, bytes]:
    """The files of the folder, each checked against the marker. Raises UserError with the way out for what is none."""
    if is_network(url):
        raise UserError(
            f"{url} is a pretrained encoder, no recogniser: fit one with `cpcscale finetune CONFIG publish=final "
            f"encoder.checkpoint={url}`"
        )
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


def _tensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    return save({name: np.array(array, order="C") for name, array in arrays.items()})


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()
