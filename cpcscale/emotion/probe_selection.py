"""Refuses or marks fine-tuning on speakers by whom the checkpoint was chosen.

A pretraining scores its checkpoints by a probe on a labelled set (cluster/probe_beside.py). A later score of the best
checkpoint on the same speakers is too good, because they chose it.
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
# How a checkpoint was `chosen`, if scores on the speakers of its `probe_set` would be too good: by the probe of its
# run, or as a recipe said of it with `encoder.selected_on_test`.
BY_PROBE, ON_TEST = "best by probe", "on test speakers"


def selection_marks(recipe: EmotionRecipe) -> list[str]:
    """[SELECTED-ON-TEST] if the recipe says so and uses pretrained weights (precpc), else []."""
    return [SELECTED_ON_TEST] if recipe.definition.takes_weights and recipe.encoder.selected_on_test else []


def refuse_selected(recipe: EmotionRecipe, corpus: Corpus, source: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint that was chosen on speakers of this corpus.

    With `encoder.selected_on_test=true` it is accepted. `source` is the metadata from `open_encoder`. A checkpoint
    named by its own path, in a run whose probe has these speakers, is accepted with a warning.
    """
    probe_set = source.get("probe_set")
    if not recipe.definition.takes_weights or not probe_set or recipe.encoder.selected_on_test:
        return
    shared = _shared(corpus, probe_set)
    if not shared:
        return
    if source["chosen"] in (BY_PROBE, ON_TEST):
        by = "its probe" if source["chosen"] == BY_PROBE else "figures"
        raise UserError(
            f"{source['url']} was chosen by {by} on {shared} of corpus {corpus.name}, so a score on them would be "
            "too good: use encoder.which=newest, another corpus, or encoder.selected_on_test=true (marked "
            "SELECTED-ON-TEST)"
        )
    if source["chosen"] == "by name":
        log.warning(
            "%s is from a run with a probe on %s of corpus %s: if you chose it by that probe, pass "
            "encoder.selected_on_test=true",
            *(source["url"], shared, corpus.name),
        )


def _shared(corpus: Corpus, probe_set: Mapping[str, Any]) -> str:
    """The speakers that the corpus and the probe share, in words; "" if none.

    Unknown speakers count as shared only if the whole corpus is the same.
    """
    if corpus.digest == probe_set["corpus_digest"]:
        return "all speakers"
    common = sorted(set(corpus.speakers) & set(probe_set["speakers"]) - {""})
    if corpus.name != probe_set["corpus"] or not common:
        return ""
    named = ", ".join(common[:3]) + (f" and {len(common) - 3} more" if len(common) > 3 else "")
    return f"speaker{'s' * (len(common) > 1)} {named}"
