"""Where the time of a rank's main thread goes, or of its GPU: every moment belongs to the phase that ends it."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

import torch

from cpcscale.account import Account


class Timeline(Protocol):
    """Seconds by phase, which add up to the time from the first mark to the last."""

    def mark(self, name: str) -> None:
        """Counts the time since the last mark as `name`."""

    def seconds(self) -> dict[str, float]:
        """The sums so far, once a GPU has come to the last mark."""


def timeline(device: torch.device) -> Timeline:
    """That of the GPU, where there is one: what the main thread does while the GPU works is not waited for."""
    return _GpuTimeline(device) if device.type == "cuda" else Account()


class _GpuTimeline:
    """Marks are events in the current stream, whose times are read late: a mark waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent: dict[str, float] = defaultdict(float)
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._free: list[torch.cuda.Event] = []

    def mark(self, name: str) -> None:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        if self._marks:
            self._marks[-1][1].synchronize()
            for (_, before), (name, event) in zip(self._marks, self._marks[1:], strict=False):
                self._spent[name] += before.elapsed_time(event) / 1000
                self._free.append(before)
            del self._marks[:-1]
        return dict(self._spent)
