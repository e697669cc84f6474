"""Checkpoints that were chosen by a probe: what a fine-tuning on the probe's own speakers has to say of itself.

A pretraining scores its checkpoints on a labelled set (cluster/probe_beside.py). The one that did best there was chosen
on those speakers, so a score on them is too good: it shows the choice, not the encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError

log = logging.getLogger(__name__)

SELECTED_ON_TEST = "SELECTED-ON-TEST"


def selection_marks(recipe: EmotionRecipe) -> list[str]:
    """SELECTED-ON-TEST where the recipe says so of the weights that it takes; the other systems take none."""
    return [SELECTED_ON_TEST] if recipe.system == "precpc" and recipe.encoder.selected_on_test else []


def refuse_selected(recipe: EmotionRecipe, corpus: Corpus, source: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint that a probe chose on speakers of this corpus, unless the recipe says so.

    `source` is the metadata of `open_encoder`. One that was named by its own path, in a run whose probe has these
    speakers, may have been chosen by that: it is said.
    """
    probe_set = source.get("probe_set")
    if recipe.system != "precpc" or not probe_set or recipe.encoder.selected_on_test:
        return
    shared = _shared(corpus, probe_set)
    if not shared:
        return
    if source["chosen"] == "best by probe":
        raise UserError(
            f"{source['url']} was chosen by its probe on {shared} of corpus {corpus.name}: a score on them says how "
            "well it was chosen; take encoder.which=newest, another corpus, or say so with "
            "encoder.selected_on_test=true (marked SELECTED-ON-TEST)"
        )
    if source["chosen"] == "by name":
        log.warning(
            "%s is of a run that was probed on %s of corpus %s: if that is why it was named, say so with "
            "encoder.selected_on_test=true",
            *(source["url"], shared, corpus.name),
        )


def _shared(corpus: Corpus, probe_set: Mapping[str, Any]) -> str:
    """The voices that the corpus and the probe have in common, in words; empty when there are none.

    Those without a name are the same where the whole corpus is.
    """
    if corpus.digest == probe_set["corpus_digest"]:
        return "all speakers"
    common = sorted(set(corpus.speakers) & set(probe_set["speakers"]) - {""}) if _same_name(corpus, probe_set) else []
    if not common:
        return ""
    named = ", ".join(common[:3]) + (f" and {len(common) - 3} more" if len(common) > 3 else "")
    return f"speaker{'s' * (len(common) > 1)} {named}"


def _same_name(corpus: Corpus, probe_set: Mapping[str, Any]) -> bool:
    return bool(corpus.name == probe_set["corpus"])
