"""The recogniser that people load, and apply to files and arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from cpcscale import audio, storage
from cpcscale.emotion.audio.labelled_file import LEAST_S
from cpcscale.emotion.encoders.networks import WindowEncoder
from cpcscale.emotion.encoders.of_recogniser import only_network
from cpcscale.emotion.systems.fusion import parts_of
from cpcscale.errors import UserError
from cpcscale.progress import Progress
from cpcscale.serve.encoder import Encoder, found_device
from cpcscale.serve.folder import SavedRecogniser, is_taken, load_recogniser, save_recogniser
from cpcscale.serve.given_audio import given_audio
from cpcscale.serve.prediction import NONE, columns
from cpcscale.serve.prediction import Prediction as Prediction
from cpcscale.serve.prediction import Predictions as Predictions
from cpcscale.serve.quality import QualityMeter
from cpcscale.shards.packing import fetch

# An utterance further from those of training than 99 of 100 held-out ones.
UNLIKE = "unlike_training"
# Is shown the samples of a file while they are there, and what was predicted.
Look: TypeAlias = "Callable[[audio.Samples, list[Prediction]], None]"
# [start, stop) of each part of so many samples that is predicted.
Spans: TypeAlias = "Callable[[int], list[tuple[int, int]]]"
# Letters of a digest that tell recognisers apart.
_DIGEST_SHOWN = 16


class Recogniser:
    """A recogniser of activation, valence and dominance, from a folder that a fine-tuning published, or from `fit`.

    >>> from cpcscale.emotion.fitted import FittedRecogniser, MeanHead
    >>> head = MeanHead(np.array([0.5, 0.0, -0.5]))
    >>> fitted = FittedRecogniser(system="mean", features=None, head=head, max_s=10.0, scale=(1.0, 5.0))
    >>> model = Recogniser(SavedRecogniser(fitted, {"corpus": "calls", "marks": ["PROXY"]}))
    >>> model
    <Recogniser mean of calls, marks PROXY>
    >>> one = model.predict(np.sin(np.arange(44_100) / 9) * np.linspace(0, 1, 44_100), rate=44_100)
    >>> one.activation, one.valence, one.dominance, one.seconds
    (4.0, 3.0, 2.0, 1.0)
    >>> one.unit
    (0.5, 0.0, -0.5)
    >>> [each.reason for each in model.predict_many(["gone.wav"])]
    ['missing']
    """

    def __init__(self, saved: SavedRecogniser) -> None:
        """Use `cpcscale.load`."""
        self._saved = saved
        # The content of scores.json, and what names exactly this recogniser: sha256 of the marker of its folder.
        self.scores, self.digest = dict(saved.scores), saved.digest

    @property
    def system(self) -> str:
        """Its system, such as precpc."""
        return self._saved.fitted.system

    @property
    def scale(self) -> tuple[float, float]:
        """(least, greatest) of the labels that it was fitted to."""
        return self._saved.fitted.scale

    @property
    def marks(self) -> tuple[str, ...]:
        """What has to be said with every figure and value of it."""
        return tuple(self.scores.get("marks", ()))

    @property
    def interval_level(self) -> float:
        """The probability of its intervals, .9 or .8; 0 where it gives none."""
        known = self._saved.held_out
        return known.level if known is not None else 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the tables of its predictions."""
        return columns(classifies=self._classifies)

    @property
    def _classifies(self) -> bool:
        return self._saved.fitted.classifier is not None

    @property
    def encoder(self) -> Encoder:
        """Its encoder, as it is after the fit.

        Raises UserError for systems without one, such as functionals, and for fusions with more than one.
        """
        parts = [part for part in parts_of(self._saved.fitted.features) if isinstance(part, WindowEncoder)]
        features = only_network(parts, self.system)
        return Encoder(features, self.scores.get("encoder", {}), self._saved.fitted.max_s)

    def to(self, device: str) -> Recogniser:
        """Itself, its networks moved to another device, such as cuda. Raises UserError where there is none."""
        saved = dataclasses.replace(self._saved, fitted=self._saved.fitted.on(found_device(device)))
        return Recogniser(saved)

    def save(self, url: str | Path, force: bool = False) -> None:
        """Writes it to a folder, local or s3://, from which `cpcscale.load` has it again.

        Raises UserError if there is something already, unless `force`.
        """
        if not force and is_taken(str(url)):
            raise UserError(f"{url} exists: save to another folder, or pass force=True to replace it")
        save_recogniser(str(url), self._saved)

    def predict(
        self,
        source: str | Path | bytes | np.ndarray,
        rate: int = 0,
        *,
        strict: bool = False,
        segments: float | None = None,
    ) -> Prediction:
        """What it says of a file (a path or s3:// URL, or its bytes), or of an array [S] or [S, channels] at `rate` Hz.

        Arrays are floats in [-1, 1] or int16. Any rate and number of channels: they come through the door that files
        come through. Audio that is no speech has NaN and a reason, with `strict` all audio with flags too. `segments`:
        the seconds of each of its segments, which then have their own values. Raises UserError for a file that is not
        there, and for an array without a rate.
        """
        name, data = given_audio(source, rate)
        whole, *parts = self._judged(name, data, spans_asked(segments, whole=True))
        if whole.reason == "missing":
            raise UserError(f"no file at {name}: check the path")
        found = dataclasses.replace(whole, segments=tuple(parts))
        return found.strict() if strict else found

    def predict_many(
        self, sources: Iterable[str | Path], *, strict: bool = False, segments: float | None = None
    ) -> Predictions:
        """What it says of each file, in order, or of each segment; one that cannot be read has its reason.

        Raises UserError for a single path, and for a list of anything else, such as samples.
        """
        if isinstance(sources, str | Path):
            raise UserError(f"{sources} is one path, and predict_many takes a list of them: pass [{str(sources)!r}]")
        found: list[Prediction] = []
        given = list(sources)
        if other := [each for each in given if not isinstance(each, str | Path)]:
            raise UserError(
                f"predict_many takes a list of paths, and this one has a {type(other[0]).__name__}: pass samples to "
                "predict, as a NumPy array with their rate"
            )
        names = [str(each) for each in given]
        with Progress("predicting", len(names), "files") as progress:
            for done, name in enumerate(names, 1):
                found += self.rows(name, strict=strict, segments=segments)
                progress.update(done)
        return Predictions(found)

    def rows(
        self,
        name: str,
        data: bytes | None = None,
        *,
        strict: bool = False,
        segments: float | None = None,
        look: Look | None = None,
    ) -> list[Prediction]:
        """What it says of one file, which is read unless `data` has its bytes: one prediction, or one a segment.

        What can not be read is one prediction with its reason.
        """
        found = self._judged(name, data, spans_asked(segments), look)
        return [each.strict() for each in found] if strict else found

    def __repr__(self) -> str:
        marks = f", marks {' '.join(self.marks)}" if self.marks else ""
        return f"<Recogniser {self.system} of {self.scores.get('corpus', 'an unknown corpus')}{marks}>"

    def _judged(self, name: str, data: bytes | None, spans: Spans, look: Look | None = None) -> list[Prediction]:
        """What it says of each of the spans of a file."""
        try:
            opened = fetch.opened(name, fetch.STREAM_BYTES) if data is None else contextlib.nullcontext(data)
            with opened as source, audio.open_samples(source) as samples:
                found = [self._of(name, samples, *span) for span in spans(len(samples))]
                if look:
                    look(samples, found)
                return found
        except storage.NotFoundError:
            return [self._none(name, "missing")]
        except audio.AudioError as error:
            local = storage.local_path(name) if data is None else None
            gone = local is not None and not os.path.lexists(local)
            return [self._none(name, "missing" if gone else error.cause)]

    def _of(self, name: str, samples: audio.Samples, start: int, stop: int) -> Prediction:
        part, start_s, seconds = samples.part(start, stop), start / audio.RATE_HZ, (stop - start) / audio.RATE_HZ
        if seconds < LEAST_S:
            return self._none(name, "short", seconds, start_s)
        meter = QualityMeter()
        for block_S in part.blocks():
            meter.add(block_S)
        quality = meter.quality(part.peak)
        if quality.reason:
            return self._none(name, quality.reason, seconds, start_s, quality.speech_share)
        output = self._saved.fitted.predict([part])
        [unit_P] = output.unit_UP
        known, low, high, flags = self._saved.held_out, NONE, NONE, quality.flags
        if known is not None:
            # Labels lie on the scale, values may lie outside; an interval has its value.
            low = self._units(np.minimum(np.clip(unit_P - known.half_P, -1, 1), unit_P))
            high = self._units(np.maximum(np.clip(unit_P + known.half_P, -1, 1), unit_P))
            if len(output.distance_U) and output.distance_U[0] > known.limit:
                flags += (UNLIKE,)
        return Prediction(
            name,
            seconds,
            *self._units(unit_P),
            _three(unit_P),
            marks=self.marks,
            flags=flags,
            speech_share=quality.speech_share,
            category=output.classes_U[0] if output.classes_U else None,
            low=low,
            high=high,
            model=self.digest[:_DIGEST_SHOWN],
            start_s=start_s,
        )

    def _units(self, unit_P: np.ndarray) -> tuple[float, float, float]:
        return _three(self._saved.fitted.in_units(unit_P))

    def _none(
        self,
        name: str,
        reason: str,
        seconds: float = math.nan,
        start_s: float = 0.0,
        speech_share: float = math.nan,
    ) -> Prediction:
        shown = self.digest[:_DIGEST_SHOWN]
        return Prediction(
            name,
            seconds,
            *NONE,
            NONE,
            reason,
            self.marks,
            speech_share=speech_share,
            model=shown,
            start_s=start_s,
            category="" if self._classifies else None,
        )


def load(url: str | Path) -> Recogniser:
    """The recogniser in a folder, local or s3://. Raises UserError where there is none, or a torn or newer one."""
    return Recogniser(load_recogniser(str(url)))


def spans_asked(segments: float | None, *, whole: bool = False) -> Spans:
    """The spans of a file that are asked for: `whole`, segments of so many seconds, or both.

    Raises UserError for segments that are too short for speech.
    """
    if segments is None:
        return lambda samples: [(0, samples)]
    if not isinstance(segments, int | float):
        raise UserError(f"segments={segments!r} is no number of seconds: give one, such as 10.0")
    if not LEAST_S <= segments < math.inf:
        raise UserError(f"segments of {segments:g} s are too short for speech: give at least {LEAST_S} s")
    size, least = round(segments * audio.RATE_HZ), round(LEAST_S * audio.RATE_HZ)
    return lambda samples: [(0, samples)] * whole + segment_spans(samples, size, least)


def segment_spans(samples: int, size: int, least: int) -> list[tuple[int, int]]:
    """[start, stop) of consecutive segments of `size`; a rest of under `least` samples belongs to the last one.

    >>> segment_spans(25, 10, 5), segment_spans(24, 10, 5), segment_spans(4, 10, 5)
    ([(0, 10), (10, 20), (20, 25)], [(0, 10), (10, 24)], [(0, 4)])
    """
    count = max(1, (samples + size - least) // size)
    edges = [*range(0, count * size, size), samples]
    return list(itertools.pairwise(edges))


def _three(values_P: np.ndarray) -> tuple[float, float, float]:
    activation, valence, dominance = map(float, values_P)
    return activation, valence, dominance
