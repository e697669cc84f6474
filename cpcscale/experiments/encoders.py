"""The network that `encoder.checkpoint` names: a place, a network of the transformers library, or a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cpcscale import storage
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders import networks
from cpcscale.emotion.encoders.huggingface import PREFIX, absolute_hf
from cpcscale.emotion.encoders.networks import OpenedEncoder
from cpcscale.emotion.probe_selection import BY_PROBE, ON_TEST
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.tracking.registry import is_name, opened

# What scores.json keeps of the metadata of a checkpoint, for those who take the encoder from the recogniser. Not its
# place: a recogniser is given away, and says nothing of the machine that made it.
_KEPT = ("fingerprint", "step", "audio_s", "chosen")


def absolute_checkpoint(url: str) -> str:
    """`encoder.checkpoint` with a local path made absolute, because workers run in other folders; names stay names."""
    if url.startswith(PREFIX):
        return absolute_hf(url)
    return url if not url or is_name(url) else storage.absolute(url)


def open_encoder(recipe: EmotionRecipe) -> OpenedEncoder:
    """As `networks.open_encoder`, also for a released recogniser and models:/NAME@ALIAS. Raises UserError likewise."""
    url = recipe.encoder.checkpoint
    if not url or not recipe.definition.takes_network:
        return networks.open_encoder(recipe)
    with opened(url) as place:
        at_place = dataclasses.replace(recipe.encoder, checkpoint=place)
        network, source = networks.open_encoder(dataclasses.replace(recipe, encoder=at_place))
    return network, source if place == url else {**source, "url": url}


def open_encoders(recipes: Mapping[str, EmotionRecipe]) -> dict[str, OpenedEncoder]:
    """`open_encoder` for each recipe, by name; a checkpoint that several use is read once."""
    known: dict[tuple[str, str], OpenedEncoder] = {}
    found = {}
    for name, recipe in recipes.items():
        place = recipe.encoder.checkpoint, recipe.encoder.which
        found[name] = (known.get(place) if recipe.definition.takes_network else None) or open_encoder(recipe)
        if found[name][0] is not None:
            known[place] = found[name]
    return found


def kept_of(recipe: EmotionRecipe, corpus: Corpus, source: Mapping[str, Any]) -> dict[str, Any]:
    """What scores.json says of a pretrained encoder; {} for systems that take no weights from a checkpoint.

    `frozen`: it is as the pretraining left it. Where it was chosen by a probe, or as the recipe says on the corpus, the
    speakers are kept, so that it is refused for them as the checkpoint itself is.
    """
    if not recipe.definition.takes_weights:
        return {}
    kept = {key: source[key] for key in _KEPT if key in source} | {"frozen": not recipe.trains_encoder}
    probe_set = source.get("probe_set")
    if recipe.encoder.selected_on_test:
        own = {"corpus": corpus.name, "corpus_digest": corpus.digest, "speakers": sorted({*corpus.speakers})}
        chosen = BY_PROBE if source.get("chosen") == BY_PROBE else ON_TEST
        return {**kept, "chosen": chosen, "probe_set": probe_set or own}
    if probe_set and source["chosen"] in (BY_PROBE, ON_TEST, "by name"):
        kept["probe_set"] = {key: probe_set[key] for key in ("corpus", "corpus_digest", "speakers")}
    return kept
