"""Where the time of a rank's loop goes: every second between two laps is one named phase or `other`."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class Meter:
    """Adds up the phases of the main thread and the audio that went through.

    Rates are over training time: the wall time since the last lap (or the start) less validation and checkpoints.
    """

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()
        self._audio_s = 0.0
        self._lap = (self._began, 0.0, dict(self._spent))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the block as `name`: wait, step, validate, save or log."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - start

    def heard(self, audio_s: float) -> None:
        """Counts audio that an update has used."""
        self._audio_s += audio_s

    @property
    def heard_s(self) -> float:
        """Seconds of audio counted so far."""
        return self._audio_s

    def lap(self) -> dict[str, float]:
        """{audio_s_per_s, data_wait_share} since the last lap; starts the next."""
        rates = self._rates(*self._lap)
        self._lap = (time.perf_counter(), self._audio_s, dict(self._spent))
        return rates

    def total(self) -> dict[str, float]:
        """The same since the start."""
        return self._rates(self._began, 0.0, {})

    def _rates(self, began: float, audio_s: float, spent: dict[str, float]) -> dict[str, float]:
        since = {name: seconds - spent.get(name, 0.0) for name, seconds in self._spent.items()}
        aside = since.get("validate", 0.0) + since.get("save", 0.0)
        training_s = max(1e-9, time.perf_counter() - began - aside)
        return {
            "audio_s_per_s": (self._audio_s - audio_s) / training_s,
            "data_wait_share": since.get("wait", 0.0) / training_s,
        }
