"""What a person sees while a verb works, on stderr: a bar in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_LOG_EVERY_S = 10.0


def note(text: str) -> None:
    """One line on stderr, above any bar."""
    tqdm.write(text, file=sys.stderr)


class Progress:
    """Progress of `total` units of work named `what`; use it as a context manager."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._began = self._said = time.monotonic()
        self._first: int | None = None
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False) if sys.stderr.isatty() else None

    def at(self, done: int, detail: str = "") -> None:
        """`done` units are finished; `detail` is a few words beside the count."""
        if self._first is None:
            self._first = done
        if self._bar:
            self._bar.n = done
            self._bar.set_postfix_str(detail)
            return
        now = time.monotonic()
        if now - self._said >= _LOG_EVERY_S or done == self._total:
            self._said = now
            parts = [f"{self._what}: {done}/{self._total} {self._unit}", self._left(done, now), detail]
            note(", ".join(part for part in parts if part))

    def _left(self, done: int, now: float) -> str:
        made = done - (self._first or 0)
        if not made or done == self._total:
            return ""
        return f"about {(now - self._began) / made * (self._total - done):.0f} s left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar:
            self._bar.close()
