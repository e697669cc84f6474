"""What the host has, brought to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Moving:
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
