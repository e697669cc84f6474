"""Progress on stderr: a bar in a terminal, a plain line every 10 s in a log."""

from __future__ import annotations

import sys
import time
from collections import deque

from tqdm import tqdm

_LOG_EVERY_S = 10.0
# The time left is computed from the last marks: the first units may have been done before, or be slower.
_MARKS, _MARK_EVERY_S = 32, 1.0


def note(text: str) -> None:
    """One line on stderr, above any bar."""
    tqdm.write(text, file=sys.stderr)


def duration(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Shows the progress of `what`: `total` units of work, named `unit`. Use it as a context manager."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._last_line = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_MARKS)
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False) if sys.stderr.isatty() else None

    def update(self, done: int, detail: str = "") -> None:
        """Shows that `done` units are finished; `detail` is a few words beside the count."""
        now = time.monotonic()
        if len(self._marks) > 1 and now - self._marks[-2][0] < _MARK_EVERY_S:
            self._marks.pop()
        self._marks.append((now, done))
        if self._bar:
            self._bar.n = done
            self._bar.set_postfix_str(detail)
            return
        if now - self._last_line >= _LOG_EVERY_S or done == self._total:
            self._last_line = now
            parts = [f"{self._what}: {done}/{self._total} {self._unit}", self._left(), detail]
            note(", ".join(part for part in parts if part))

    def _left(self) -> str:
        (started, first), (now, done) = self._marks[0], self._marks[-1]
        if done <= first or done >= self._total:
            return ""
        return f"about {duration((now - started) / (done - first) * (self._total - done))} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the bar from the terminal."""
        if self._bar:
            self._bar.close()
