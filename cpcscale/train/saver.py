"""Saves checkpoints in a background thread: the training loop only waits for a copy in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cpcscale.errors import UserError
from cpcscale.runs.ledger import heldout_loss
from cpcscale.runs.publisher import Publisher
from cpcscale.train.checkpoint import RunPosition, Tensors, checkpoint_files_of

log = logging.getLogger(__name__)


class HostCopies:
    """Copies tensors to CPU memory, into the same buffers each time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        """Copies of the tensors as they are now. Call `wait` before reading them: a GPU copies in the background."""
        copies = {
            part: {name: self._copy(part, name, tensor) for name, tensor in named.items()}
            for part, named in tensors.items()
        }
        if any(tensor.is_cuda for named in tensors.values() for tensor in named.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Waits until the copies are complete."""
        if self._copied:
            self._copied.synchronize()

    def _copy(self, part: str, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get((part, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # A GPU copies in the background only into pinned memory.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[part, name] = buffer
        if tensor.is_cuda:
            return buffer.copy_(tensor.detach(), non_blocking=True)
        # By numpy, in this thread alone: torch's copy waits for all of its threads, on a busy machine 100 ms and more.
        np.copyto(_bytes(buffer), _bytes(tensor.detach().contiguous()))
        return buffer


def _bytes(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.view(-1).view(torch.uint8).numpy())


class Saver:
    """Publishes checkpoints in a background thread, one at a time. Not thread-safe: one thread makes all calls."""

    def __init__(self, publisher: Publisher, spec: object) -> None:
        """`spec` is the config that is stored in the checkpoints."""
        self._publisher, self._spec = publisher, spec
        self._snapshot = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[str] | None = None
        self.url: str | None = None
        # Seconds that the thread has spent on saving.
        self.busy_s = 0.0

    def save(self, tensors: Tensors, position: RunPosition) -> None:
        """Copies both, starts to publish the copies and returns. Call `wait` first: no save may be in progress."""
        assert self._saving is None
        copies, then = self._snapshot.take(tensors), position.copied()
        self._saving = self._thread.submit(self._publish, copies, then)

    def published(self) -> bool:
        """Whether a checkpoint was published since the last call; `url` is its folder then. Never waits or raises."""
        if self._saving is None or not self._saving.done() or self._saving.exception():
            return False
        self.url, self._saving = self._saving.result(), None
        return True

    def wait(self) -> UserError | None:
        """Waits for the save in progress. Returns its error if that is a UserError, and raises any other."""
        if self._saving is None:
            return None
        error = self._saving.exception()
        if error is None:
            return None
        self._saving = None
        if isinstance(error, UserError):
            return error
        raise error

    def close(self) -> None:
        """Waits for the save in progress and ends the thread. Logs the error of that save as a warning."""
        self._thread.shutdown()
        if self._saving and (error := self._saving.exception()):
            log.warning("the last checkpoint was not published: %s", error)

    def _publish(self, copies: Mapping[str, Mapping[str, Tensor]], position: RunPosition) -> str:
        began = time.perf_counter()
        try:
            self._snapshot.wait()
            files = checkpoint_files_of(copies, position, self._spec, self._publisher.probe_set)
            return self._publisher.publish(position.step, heldout_loss(position.metrics), files)
        finally:
            self.busy_s += time.perf_counter() - began
