"""The recogniser that people load, and apply to files and arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import soundfile

from cpcscale import audio, storage
from cpcscale.emotion.audio.labelled_file import LEAST_S
from cpcscale.emotion.fitted import FittedRecogniser
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError, shown_name
from cpcscale.progress import Progress
from cpcscale.serve.folder import load_recogniser, recogniser_digest
from cpcscale.serve.table import csv_text
from cpcscale.shards.packing import fetch

COLUMNS = ("file", "start_s", "end_s", *PRIMITIVES, "reason", "marks", "model")
# Is shown the samples of a file while they are there, and what was predicted.
Look: TypeAlias = "Callable[[audio.Samples, list[Prediction]], None]"
# [start, stop) of each part of so many samples that is predicted.
Spans: TypeAlias = "Callable[[int], list[tuple[int, int]]]"
# Letters of a digest that tell recognisers apart.
_DIGEST_SHOWN = 16


@dataclass(frozen=True)
class Prediction:
    """What a recogniser says of one file or array, or of the `seconds` from `start_s` on that are a segment of it.

    `activation`, `valence` and `dominance` are on the scale of the corpus that it was fitted to, `unit` the same three
    on [-1, 1]; NaN where `reason` says why there is none. `marks` are those of the recogniser's scores, `model` is its
    digest. `segments` are there if they were asked for and the file can be read.
    """

    file: str
    seconds: float
    activation: float
    valence: float
    dominance: float
    unit: tuple[float, float, float]
    reason: str = ""
    marks: tuple[str, ...] = ()
    model: str = ""
    start_s: float = 0.0
    segments: tuple[Prediction, ...] = ()

    def row(self) -> dict[str, Any]:
        """Its row in a table, by COLUMNS."""
        values = {name: _cell(getattr(self, name)) for name in PRIMITIVES}
        end_s = _cell(self.start_s + self.seconds, 3)
        return {
            "file": shown_name(self.file),
            "start_s": "" if end_s == "" else _cell(self.start_s, 3),
            "end_s": end_s,
            **values,
            "reason": self.reason,
            "marks": " ".join(self.marks),
            "model": self.model,
        }


class Predictions(Sequence[Prediction]):
    """Predictions in the order of what was asked for."""

    def __init__(self, found: Iterable[Prediction]) -> None:
        self._found = tuple(found)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, place: Any) -> Any:
        return self._found[place]

    def to_csv(self) -> str:
        """A table with the columns COLUMNS, a row for each prediction."""
        return csv_text(COLUMNS, (each.row() for each in self._found))

    def to_pandas(self) -> Any:
        """The same as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame([each.row() for each in self._found], columns=list(COLUMNS))


class Recogniser:
    """A recogniser of activation, valence and dominance, from a folder that a fine-tuning published."""

    def __init__(self, fitted: FittedRecogniser, scores: dict[str, Any], digest: str = "") -> None:
        """Use `cpcscale.load`. `scores` is the content of scores.json, `digest` names the folder that it came from."""
        self._fitted, self.scores, self.digest = fitted, scores, digest

    @property
    def system(self) -> str:
        """Its system, such as precpc."""
        return self._fitted.system

    @property
    def scale(self) -> tuple[float, float]:
        """(least, greatest) of the labels that it was fitted to."""
        return self._fitted.scale

    @property
    def marks(self) -> tuple[str, ...]:
        """What has to be said with every figure and value of it."""
        return tuple(self.scores.get("marks", ()))

    def predict(self, source: str | Path | np.ndarray, rate: int = 0, *, segments: float | None = None) -> Prediction:
        """What it says of a file (a path or s3:// URL), or of an array [S] or [S, channels] at `rate` Hz.

        Arrays are floats in [-1, 1] or int16. Any rate and number of channels: they come through the door that files
        come through. Audio that is no speech has NaN and a reason. `segments`: the seconds of each of its segments,
        which then have their own values. Raises UserError for a file that is not there, and for an array without a
        rate.
        """
        if isinstance(source, np.ndarray):
            whole, *parts = self._judged("", _as_file(source, rate), _spans(segments, whole=True))
        else:
            whole, *parts = self._judged(str(source), None, _spans(segments, whole=True))
            if whole.reason == "missing":
                raise UserError(f"no file at {source}: check the path")
        return dataclasses.replace(whole, segments=tuple(parts))

    def predict_many(self, sources: Iterable[str | Path], *, segments: float | None = None) -> Predictions:
        """What it says of each file, in order, or of each segment; one that cannot be read has its reason."""
        found: list[Prediction] = []
        names = [str(each) for each in sources]
        with Progress("predicting", len(names), "files") as progress:
            for done, name in enumerate(names, 1):
                found += self.rows(name, segments=segments)
                progress.update(done)
        return Predictions(found)

    def rows(
        self, name: str, data: bytes | None = None, *, segments: float | None = None, look: Look | None = None
    ) -> list[Prediction]:
        """What it says of one file, which is read unless `data` has its bytes: one prediction, or one a segment.

        What can not be read is one prediction with its reason.
        """
        return self._judged(name, data, _spans(segments), look)

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
        try:
            part.check()
        except audio.AudioError as error:
            return self._none(name, error.cause, seconds, start_s)
        [unit_P] = self._fitted.predict([part])
        activation, valence, dominance = (float(value) for value in self._fitted.in_units(unit_P))
        unit = (float(unit_P[0]), float(unit_P[1]), float(unit_P[2]))
        values = (activation, valence, dominance, unit)
        return Prediction(name, seconds, *values, "", self.marks, self.digest[:_DIGEST_SHOWN], start_s)

    def _none(self, name: str, reason: str, seconds: float = math.nan, start_s: float = 0.0) -> Prediction:
        none = math.nan
        values = (none, none, none, (none, none, none))
        return Prediction(name, seconds, *values, reason, self.marks, self.digest[:_DIGEST_SHOWN], start_s)


def load(url: str | Path) -> Recogniser:
    """The recogniser in a folder, local or s3://. Raises UserError where there is none, or a torn or newer one."""
    return Recogniser(*load_recogniser(str(url)), recogniser_digest(str(url)))


def _spans(segments: float | None, *, whole: bool = False) -> Spans:
    """The spans of a file that are asked for: `whole`, segments of so many seconds, or both.

    Raises UserError for segments that are too short for speech.
    """
    if segments is None:
        return lambda samples: [(0, samples)]
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


def _as_file(wave: np.ndarray, rate: int) -> bytes:
    """An array as a WAV file. Raises UserError for what is no audio."""
    if rate <= 0:
        raise UserError(f"rate={rate}: an array has no sampling rate of its own: pass it, as predict(array, 16000)")
    if wave.ndim not in (1, 2) or not (np.issubdtype(wave.dtype, np.floating) or wave.dtype == np.int16):
        raise UserError(
            f"an array of shape {wave.shape} and type {wave.dtype} is no audio: pass float or int16 values [samples] "
            "or [samples, channels]"
        )
    out, kind = io.BytesIO(), "PCM_16" if wave.dtype == np.int16 else "FLOAT"
    try:
        soundfile.write(out, wave if kind == "PCM_16" else wave.astype(np.float32), int(rate), kind, format="WAV")
    except (soundfile.SoundFileError, OverflowError):
        raise UserError(
            f"an array of shape {wave.shape} at {rate} Hz is no audio: pass [samples] or [samples, channels], of at "
            "most 1,024 channels, and the rate in Hz"
        ) from None
    return out.getvalue()


def _cell(value: float, digits: int = 4) -> Any:
    return "" if math.isnan(value) else round(value, digits)
