"""The files of a saved recogniser (serve/folder.py), and the network in them as a pretrained encoder for others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.numpy import load

from cpcscale import config
from cpcscale.emotion.encoders.arrays import Arrays, below
from cpcscale.errors import UserError
from cpcscale.storage.marked_folder import FolderFormat

T = TypeVar("T")

CONFIG, MODEL, SCORES = "config.json", "model.safetensors", "scores.json"
FOLDER = FolderFormat("recogniser", 1, CONFIG, re.compile(r"[A-Za-z][A-Za-z0-9_]*\.(safetensors|json|md)"))
# What scores.json may say of the encoder's checkpoint, beside its probe.
_SAID = {"fingerprint": str, "step": int, "audio_s": float, "chosen": str}
# The key of the licences of what an encoder has learnt from.
PRETRAINING_AUDIO = "audio that the encoder was pretrained on"


def only_network(found: Sequence[T], system: str) -> T:
    """The one network of a recogniser of this system. Raises UserError where there is none, or more than one."""
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"a recogniser with system={system} has {len(found)} networks, and which is meant is not known: name one "
            "with a single encoder, such as system=precpc"
        )
    raise UserError(f"a recogniser with system={system} has no encoder: name one with system=precpc, or a pretraining")


def network_of(url: str, rebuild: Callable[[Mapping[str, Any], Arrays], T]) -> tuple[T, dict[str, Any]]:
    """(what `rebuild` makes of the network's description and arrays, its metadata) of the recogniser at `url`.

    The metadata, as `load_encoder` gives it, is what scores.json keeps of the checkpoint: `fingerprint`, `step`, how it
    was `chosen` and by which `probe_set`; and the `licence` of its audio.

    Raises UserError for a torn folder, without exactly one network, and for a network that is not as a pretraining left
    it: it may know the speakers and labels of the recogniser's corpus, and scores on these would be too high.
    """
    files = FOLDER.read_files(url)
    try:
        described, scores = config.read_json(files[CONFIG]), config.read_json(files[SCORES])
        features, system = described["features"], str(described["system"])
        fused = features["kind"] == "fused"
        numbered = list(enumerate(features["parts"] if fused else [features]))
        number, part = only_network([each for each in numbered if "network" in each[1]], system)
        made = rebuild(part, below(load(files[MODEL]), f"encoder.{number}." if fused else "encoder."))
        known, corpus = scores["encoder"], str(scores["corpus"])
        source: dict[str, Any] = {"url": url, "fingerprint": "unknown", "chosen": "by name"}
        source |= {key: kind(known[key]) for key, kind in _SAID.items() if key in known}
        source["licence"] = str(scores.get("licences", {}).get(PRETRAINING_AUDIO, "unknown"))
        if probe := known.get("probe_set"):
            named = {key: str(probe[key]) for key in ("corpus", "corpus_digest")}
            source["probe_set"] = named | {"speakers": [str(each) for each in probe["speakers"]]}
        frozen = known.get("frozen") is True
    except UserError as error:
        raise UserError(f"{url}: {error}") from None
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError, SafetensorError) as error:
        raise UserError(f"{url} is no recogniser ({type(error).__name__}): fit it again") from None
    if not frozen:
        raise UserError(
            f"{url} does not say that its encoder is as a pretraining left it: it may know the speakers of {corpus}, "
            "and scores on them would be too high; name a pretraining, or fit the recogniser again with system=precpc "
            "and encoder.frozen=true"
        )
    return made, source
