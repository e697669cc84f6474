"""The recogniser or the encoder at a place."""

from __future__ import annotations

from cpcscale.emotion.encoders.networks import is_network
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
    """The encoder at a place, or that of the recogniser there. Raises UserError unless there is exactly one."""
    found = opened_model(url)
    return found if isinstance(found, Encoder) else found.encoder
