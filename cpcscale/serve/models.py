"""The recogniser or the encoder at a place."""

from __future__ import annotations

from cpcscale.emotion.encoders.networks import is_network
from cpcscale.errors import UserError
from cpcscale.serve.encoder import Encoder
from cpcscale.serve.folder import load_recogniser
from cpcscale.serve.recogniser import Recogniser


def opened_model(place: str, name: str = "") -> Recogniser | Encoder:
    """What lies at a path or s3:// URL. An encoder says that it is from `name`, if that is another place.

    Raises UserError where there is none, or a torn or newer one.
    """
    if not is_network(place):
        return Recogniser(load_recogniser(place))
    found = Encoder.open(place)
    if name not in ("", place):
        found.source["url"] = name
    return found


def load_encoder(url: str) -> Encoder:
    """The encoder at a place, or that of the recogniser there. Raises UserError where there is none."""
    found = opened_model(url)
    if isinstance(found, Encoder):
        return found
    if (encoder := found.encoder) is None:
        raise UserError(f"{url} is a recogniser with system={found.system}, which has no encoder: name another one")
    return encoder
