"""What a recogniser says of audio, and its row in a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.errors import UserError, nearest, shown_name
from cpcscale.serve.table import TEXTS, csv_text

BOUNDS = tuple(f"{name}_{bound}" for name in PRIMITIVES for bound in ("low", "high"))
NONE = (math.nan, math.nan, math.nan)


def columns(*, classifies: bool) -> tuple[str, ...]:
    """The columns of a table of predictions, with the category if the recogniser has a classifier."""
    values = ("start_s", "end_s", *PRIMITIVES, *BOUNDS, *(["category"] if classifies else []))
    return ("file", *values, "speech_share", "reason", "flags", "marks", "model")


@dataclass(frozen=True)
class Prediction:
    """What a recogniser says of one file or array, or of the `seconds` from `start_s` on that are a segment of it.

    `activation`, `valence` and `dominance` are on the scale of the corpus that it was fitted to, `unit` the same three
    on [-1, 1]; NaN where `reason` says why there is none. `category` is None where the recogniser has no classifier.
    `speech_share` is how much of the audio is speech, 0 to 1. `flags` say what makes the values doubtful: those of
    `cpcscale.serve.quality`, and unlike_training. `marks` are those of the recogniser's scores, `model` is its digest.
    `segments` are there if they were asked for and the file can be read.
    """

    file: str
    seconds: float
    activation: float
    valence: float
    dominance: float
    unit: tuple[float, float, float]
    reason: str = ""
    marks: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    speech_share: float = math.nan
    category: str | None = None
    # The lower and upper ends of the intervals, by primitive; NaN where the recogniser gives none.
    low: tuple[float, float, float] = NONE
    high: tuple[float, float, float] = NONE
    model: str = ""
    start_s: float = 0.0
    segments: tuple[Prediction, ...] = ()

    def strict(self) -> Prediction:
        """Itself; without its values if it has flags, which are the reason then."""
        segments = tuple(each.strict() for each in self.segments)
        if self.reason or not self.flags:
            return dataclasses.replace(self, segments=segments)
        return dataclasses.replace(
            self,
            activation=math.nan,
            valence=math.nan,
            dominance=math.nan,
            unit=NONE,
            low=NONE,
            high=NONE,
            category=None if self.category is None else "",
            reason=" ".join(self.flags),
            segments=segments,
        )

    def interval(self, name: str) -> tuple[float, float]:
        """(low, high) of activation, valence or dominance, in its units; NaN where there is none.

        Over new speakers like those of its corpus, the label lies within it with the probability
        `Recogniser.interval_level`, on average, not for each speaker. Raises UserError for another name.
        """
        if name not in PRIMITIVES:
            raise UserError(f"{name!r} is not one of {', '.join(PRIMITIVES)}{nearest(name, list(PRIMITIVES))}")
        place = PRIMITIVES.index(name)
        return self.low[place], self.high[place]

    def row(self) -> dict[str, Any]:
        """Its row in a table, by `columns`."""
        values = {name: _cell(getattr(self, name)) for name in PRIMITIVES}
        ends = [end for pair in zip(self.low, self.high, strict=True) for end in pair]
        end_s = _cell(self.start_s + self.seconds, 3)
        return {
            "file": shown_name(self.file),
            "start_s": "" if end_s == "" else _cell(self.start_s, 3),
            "end_s": end_s,
            **values,
            **{name: _cell(end) for name, end in zip(BOUNDS, ends, strict=True)},
            **({} if self.category is None else {"category": self.category}),
            "speech_share": _cell(self.speech_share, 3),
            "reason": self.reason,
            "flags": " ".join(self.flags),
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
        found = self._found[place]
        return Predictions(found) if isinstance(place, slice) else found

    def to_csv(self) -> str:
        """A table with a row for each prediction."""
        return csv_text(self._columns, (each.row() for each in self._found))

    def to_pandas(self) -> Any:
        """The same as a pandas DataFrame; NaN where there is no number."""
        import pandas

        rows = [
            {name: math.nan if cell == "" and name not in TEXTS else cell for name, cell in each.row().items()}
            for each in self._found
        ]
        return pandas.DataFrame(rows, columns=list(self._columns))

    @property
    def _columns(self) -> tuple[str, ...]:
        return columns(classifies=any(each.category is not None for each in self._found))


def _cell(value: float, digits: int = 4) -> Any:
    return "" if math.isnan(value) else round(value, digits)
