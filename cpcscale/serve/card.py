"""What a saved recogniser says of itself: the figures with all that they rest on, and the model card for people."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cpcscale import __version__
from cpcscale.emotion.held_out import HeldOut
from cpcscale.emotion.scores.ccc import PRIMITIVES

if TYPE_CHECKING:
    from cpcscale.emotion.finetune_result import FinetuneResult

_MADE = "The speech and the labels of its corpus are synthetic: what it gives means nothing about emotion."
_CARD = """\
# Activation, valence and dominance in speech: {system}, fitted to {corpus}

It takes speech and gives three numbers on the scale of the corpus that it was fitted to: how others perceive the
activation, valence and dominance of the speaker, or how an actor was told to sound. It says nothing about what a person
feels.

{warning}## Figures

The concordance correlation (CCC) of the procedure that made it, on speakers that it did not know: {corpus}, {protocol},
{utterances} utterances of {speakers} speakers.

| | CCC | 95 % interval |
|---|---|---|
{rows}

{intervals}

The recogniser itself has learnt from {learnt_utterances} utterances of {learnt_speakers} speakers, so a score on them
would say nothing.

{shift}## Marks

{marks}

## Licences

{licences}

## Out of scope

Decisions about people in employment, education, policing or health. In the European Union, systems that infer emotions
are prohibited at work and in education but for medical or safety reasons (AI Act, Art. 5(1)(f)); elsewhere people must
be told (Art. 50(3)).

## Versions

{versions}
"""
_SHIFT = """\
## Other levels, and the telephone

What the same audio gets when it is louder, quieter or cut to the telephone band, less what it gets as it is: mean and
deviation over utterances, in the units of the labels.

| | {names} |
|---|---|---|---|
{rows}

"""
_CHANGES = {"gain+12": "12 dB louder", "gain-12": "12 dB quieter", "telephone": "300 to 3400 Hz"}
_MEANING = {
    "PROXY": "the labels are stand-ins, one point for each acted category, not ratings",
    "MADE": "speech and labels are synthetic: its figures show that the software works, nothing about emotion",
    "LEAKY": "speakers of the test were in training too: its figures are too high",
    "TRANSDUCTIVE": "the encoder was pretrained on audio of test speakers too",
    "SPEAKER-ADAPTED": "features were scaled by all audio of a speaker, test speakers included",
    "NON-COMMERCIAL": "something that it was made from may not be used commercially, nor may what is made from it",
    "RESEARCH-ONLY": "something that it was made from is for research alone, and so is the recogniser",
    "SELECTED-ON-TEST": "the encoder, or how it is read, was chosen on test speakers: the figures are too high",
}


def recogniser_scores(
    result: FinetuneResult,
    encoder: Mapping[str, Any],
    *,
    utterances: int,
    speakers: int,
    licences: Mapping[str, str],
    training_rows: int,
) -> dict[str, Any]:
    """The content of scores.json: the cross-validated figures of the procedure that made the recogniser.

    `utterances` and `speakers` are those it has learnt from, of which `training_rows` are in it as they are; `encoder`
    is what is known of a pretrained one. `licences` are those of all that it was made from; one may have lines.
    """
    return {
        "system": result.system,
        "corpus": result.corpus,
        "protocol": result.protocol,
        "marks": [*result.marks, *licence_marks(licences)],
        "licences": dict(licences),
        "learnt_from": {"utterances": utterances, "speakers": speakers},
        "training_rows": training_rows,
        "tested_on": {"utterances": result.utterances, "speakers": result.speakers},
        "ccc": result.ccc,
        "interval": result.interval,
        "digests": dict(result.identity),
        "encoder": dict(encoder),
        "versions": {
            "cpcscale": __version__,
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "scikit-learn": version("scikit-learn"),
            "numpy": np.__version__,
        },
    }


# What an owner's licence makes of a recogniser.
LICENCE_MARKS = ("NON-COMMERCIAL", "RESEARCH-ONLY")


def licence_marks(licences: Mapping[str, str]) -> list[str]:
    """What has to be said with every value of what was made under these licences."""
    text = "; ".join(licences.values())
    limits = (r"\bnc\b|non.?commercial|(not for|no) commercial", r"\b(research|academic)\b")
    return [mark for mark, limit in zip(LICENCE_MARKS, limits, strict=True) if re.search(limit, text, re.IGNORECASE)]


def intervals(held_out: HeldOut | None, scale: tuple[float, float]) -> dict[str, Any] | None:
    """What people are told of the intervals: their probability, and for each primitive the half-width in units.

    `informative`: whether it is clearly narrower than that of a recogniser that says the same of every utterance.
    """
    if held_out is None:
        return None
    halves = held_out.half_P * (scale[1] - scale[0]) / 2
    return {
        "level": held_out.level,
        "speakers": len(np.unique(held_out.speaker_U)),
        "half_width": {name: float(half) for name, half in zip(PRIMITIVES, halves, strict=True)},
        "informative": {name: bool(each) for name, each in zip(PRIMITIVES, held_out.informative_P, strict=True)},
    }


def _intervals_text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return (
            "It gives no intervals: they need errors on at least 4 speakers by whom nothing was learnt or chosen, and "
            "features that are not scaled by speaker."
        )
    parts = [
        f"{name} +-{half:.2f}{'' if found['informative'][name] else ' (uninformative: as wide as for a constant)'}"
        for name, half in found["half_width"].items()
    ]
    text = (
        f"Each value has an interval: {', '.join(parts)}, cut to the scale. Over new speakers like the "
        f"{found['speakers']} of its corpus, recorded like them, at least {found['level']:.0%} of the labels lie in it "
        "on average: not for each speaker, and not for other microphones or languages. It is approximate, for the "
        "errors are those of the folds' recognisers."
    )
    return textwrap.fill(text, 120)


def _licences_text(scores: Mapping[str, Any]) -> str:
    lines = []
    for what, licence in scores["licences"].items():
        several = str(licence).strip().splitlines()
        lines += [f"- {what}: {licence}"] if len(several) < 2 else [f"- {what}:", *(f"  - {each}" for each in several)]
    lines.append("- the network that finds speech, silero-vad: MIT")
    if rows := scores["training_rows"]:
        lines.append(
            f"- training rows: contains {rows:,}, for support vectors are features of real utterances, from which "
            "speech cannot be made again, but a speaker may be told; head=ridge keeps none"
        )
    return "\n".join(lines)


def card(scores: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    """The model card, in Markdown; `found` as `intervals` gives it."""
    learnt, tested, interval = scores["learnt_from"], scores["tested_on"], scores["interval"]
    marks = [f"- {mark}: {_MEANING.get(mark, 'see the documentation of protocols')}" for mark in scores["marks"]]
    rows = []
    for name in (*PRIMITIVES, "mean"):
        bounds = f"{interval[name][0]:.2f} to {interval[name][1]:.2f}" if interval else "none below 6 speakers"
        rows.append(f"| {name} | {scores['ccc'][name]:.3f} | {bounds} |")
    return _CARD.format(
        system=scores["system"],
        corpus=scores["corpus"],
        protocol=scores["protocol"],
        warning=f"{_MADE}\n\n" if "MADE" in scores["marks"] else "",
        utterances=f"{tested['utterances']:,}",
        speakers=tested["speakers"],
        rows="\n".join(rows),
        shift=_shift(scores["shift"]) if "shift" in scores else "",
        intervals=_intervals_text(found),
        learnt_utterances=f"{learnt['utterances']:,}",
        learnt_speakers=learnt["speakers"],
        marks="\n".join(marks) or "None.",
        licences=_licences_text(scores),
        versions=", ".join(f"{name} {version}" for name, version in scores["versions"].items()),
    )


def _shift(shifts: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The section on the result of `measure_shift`."""
    rows = []
    for name, found in shifts.items():
        cells = (f"{mean:+.2f} ± {deviation:.2f}" for mean, deviation in (found[each] for each in PRIMITIVES))
        rows.append(f"| {_CHANGES[name]} | {' | '.join(cells)} |")
    return _SHIFT.format(names=" | ".join(PRIMITIVES), rows="\n".join(rows))
