"""Measures what several threads spend their time on, by name."""

from __future__ import annotations

import threading
import time
from collections import defaultdict


class TimeByName:
    """Seconds by name, summed over threads. Each thread calls `mark` at the end of each piece of its work."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._threads: list[dict[str, float]] = []

    def mark(self, name: str) -> None:
        """Adds the time since this thread's last mark to `name`."""
        now = time.perf_counter()
        local = self._local
        try:
            local.spent[name] += now - local.since
        except AttributeError:
            if not hasattr(local, "spent"):
                local.spent = defaultdict(float)
                with self._lock:
                    self._threads.append(local.spent)
            if hasattr(local, "since"):
                local.spent[name] += now - local.since
        local.since = now

    def seconds(self) -> dict[str, float]:
        """Seconds by name so far, summed over all threads."""
        with self._lock:
            total: dict[str, float] = defaultdict(float)
            for spent in self._threads:
                for name, seconds in list(spent.items()):
                    total[name] += seconds
        return dict(total)
