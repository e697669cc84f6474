"""What `cpcscale.load` gives: the recogniser or the encoder at a place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpcscale.emotion.encoders.networks import is_network
from cpcscale.errors import UserError
from cpcscale.serve.encoder import Encoder
from cpcscale.serve.folder import load_recogniser
from cpcscale.serve.recogniser import Recogniser


def load(url: str | Path) -> Any:
    """What lies at a path or s3:// URL, ready to use: a `Recogniser` or an `Encoder`.

    A folder that `finetune publish=final`, `fit` or `save` wrote gives a Recogniser. The run_dir of a `cpcscale
    pretrain` gives the Encoder of its newest checkpoint, the folder of a checkpoint that one; hf:NAME and hf:FOLDER are
    networks of the transformers library. Raises UserError where there is none, or a torn or newer one.

    >>> load("runs/none")
    Traceback (most recent call last):
    cpcscale.errors.UserError: no recogniser at runs/none: name the folder of one, such as RUN_DIR/recogniser
    """
    place = str(url)
    return Encoder.open(place) if is_network(place) else Recogniser(*load_recogniser(place))


def load_encoder(url: str) -> Encoder:
    """The encoder at a place, or that of the recogniser there. Raises UserError where there is none."""
    found = load(url)
    encoder = found if isinstance(found, Encoder) else found.encoder
    if encoder is None:
        raise UserError(f"{url} is a recogniser with system={found.system}, which has no encoder: name another one")
    return encoder
