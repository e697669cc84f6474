"""The device of a rank: asynchronous copies to it, and a timeline of what it spends its time on."""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

import torch
from torch import Tensor

from cpcscale.time_by_name import TimeByName


class DeviceCopies:
    """Copies tensors from the host to a device; on a GPU in a separate stream, during the previous update.

    The call returns at once; the GPU's current stream waits for the copies. Tensors are pinned first, and torch's
    allocator reuses the pinned memory only when the copy out of it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the device; on the CPU, the tensors themselves."""
        if self._stream is None:
            return tensors
        with torch.cuda.stream(self._stream):
            moved = tuple(tensor.pin_memory().to(self._device, non_blocking=True) for tensor in tensors)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in moved:
            # The memory belongs to the copying stream, which must not reuse it while the current stream reads it.
            tensor.record_stream(current)
        return moved


class Timeline(Protocol):
    """Adds up seconds by phase, from the first mark to the last."""

    def mark(self, name: str) -> None:
        """Counts the time since the last mark as `name`."""

    def seconds(self) -> dict[str, float]:
        """The sums so far. Waits until a GPU has reached the last mark."""


def make_timeline(device: torch.device) -> Timeline:
    """A timeline of the device: on a GPU of its stream's work, on a CPU of the main thread."""
    return _GpuTimeline(device) if device.type == "cuda" else TimeByName()


class _GpuTimeline:
    """Marks are CUDA events in the current stream, read only in `seconds`, so a mark never waits."""

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
