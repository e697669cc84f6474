"""The device of a rank: tensors brought to it without waiting, and where its time goes."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

import torch
from torch import Tensor

from cpcscale.time_by_name import TimeByName


class DeviceCopies:
    """Copies tensors of the host to a device; on a GPU in a stream of their own, beside the work of the last update.

    The host returns at once, and the GPU's own stream goes on when the copies are there. What is copied is pinned
    first, in memory that torch's allocator keeps and gives out again only when the copy out of it is over.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the device; themselves, where that is the CPU."""
        if self._stream is None:
            return tensors
        with torch.cuda.stream(self._stream):
            moved = tuple(tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in moved:
            # Its memory is the copying stream's, which must not have it back while the other one reads.
            tensor.record_stream(current)
        return moved


class Timeline(Protocol):
    """Seconds by phase, which add up to the time from the first mark to the last."""

    def mark(self, name: str) -> None:
        """Counts the time since the last mark as `name`."""

    def seconds(self) -> dict[str, float]:
        """The sums so far, once a GPU has come to the last mark."""


def make_timeline(device: torch.device) -> Timeline:
    """That of the GPU, where there is one: what the main thread does while the GPU works is not waited for."""
    return _GpuTimeline(device) if device.type == "cuda" else TimeByName()


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
