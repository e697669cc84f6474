"""All use of torch.distributed: collectives between the ranks of a run. With one rank every call is the identity."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpcscale.errors import UserError

# Texts by which gloo's errors are recognised: they have no type of their own.
_GLOO = ("gloo", "Connection closed by peer", "Connection reset by peer")


class PeerLostError(RuntimeError):
    """A collective failed because another rank is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process as rank `rank` of `world` ranks, `on_node` of them on its machine.

    CPU tensors and Python values are exchanged over the process group `hosts`, without waiting for a GPU.
    """

    rank: int
    world: int
    on_node: int
    device: torch.device
    # None: the default group, which is gloo when no rank has a GPU.
    hosts: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, device: torch.device | None = None) -> Ranks:
        """The ranks of the process group that Ray Train, torchrun or a test has set up; a single rank without a group.

        `device` is the device of this rank, by default the GPU with the number LOCAL_RANK, or the CPU. All ranks must
        call this together.
        """
        device = device or _device()
        if not dist.is_initialized():
            return cls(0, 1, 1, device)
        world = dist.get_world_size()
        hosts = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), world, int(os.environ.get("LOCAL_WORLD_SIZE", world)), device, hosts)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs, saves and decides."""
        return self.rank == 0

    def wrap_ddp(self, module: nn.Module) -> nn.Module:
        """The module under DDP, which averages gradients over ranks; the module itself when alone."""
        if self.world == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Newer versions of torch name the flag differently, older ones know only this name.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # Buffers depend only on the config and the data, so they are the same on all ranks.
            wrapped = DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
        if self.device.type == "cpu":
            # Only on the CPU: on a GPU each sample waits for the device, so the default of one pass in 100 stays.
            wrapped._set_ddp_runtime_logging_sample_rate(1)
        return wrapped

    def exchange_s(self, module: nn.Module) -> tuple[float, float]:
        """(seconds that a module of `wrap_ddp` has exchanged gradients, those of them not hidden by the backward pass).

        The last pass is not included yet.
        """
        if not isinstance(module, DistributedDataParallel):
            return 0.0, 0.0
        logged = module._get_ddp_logging_data()
        passes = 1e-9 * float(logged.get("iteration", 0))
        took, covered = (
            passes * float(logged.get(f"avg_backward_{name}_time", 0)) for name in ("comm", "compute_comm_overlap")
        )
        return took, took - covered

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over ranks, on every rank."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, group=self._group(values))
        return values

    def max(self, values: Tensor) -> Tensor:
        """The elementwise maximum of `values` over ranks, on every rank."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group(values))
        return values

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, slice]:
        """([R, ...] rows of all ranks, slice of this rank's rows), without gradient.

        Each rank's rows are padded with zero rows to the largest number that a rank has.
        """
        if self.world == 1:
            return rows, slice(0, len(rows))
        count = int(self.max(torch.tensor(len(rows))))
        mine = torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine, group=self._group(mine))
        return torch.cat(parts), slice(self.rank * count, self.rank * count + len(rows))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, a plain Python object, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.hosts)
        return values

    def _group(self, values: Tensor) -> dist.ProcessGroup | None:
        return self.hosts if values.device.type == "cpu" else None

    @contextlib.contextmanager
    def detect_lost_peers(self) -> Iterator[None]:
        """Raises a PeerLostError when the block fails because another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or any(word in str(error) for word in _GLOO):
                raise PeerLostError(str(error).splitlines()[0]) from error
            raise

    def raise_on_all(self, error: UserError | None) -> None:
        """Raises the first rank's `error` on every rank, so that all stop together with the same line."""
        errors = [text for text in self.gather(str(error) if error else None) if text]
        if errors:
            raise UserError(errors[0])


@contextlib.contextmanager
def join_ranks(rank: int, world: int, meeting: str, device: torch.device | None = None) -> Iterator[Ranks]:
    """Makes this process rank `rank` of `world` for the block, over NCCL when its `device` is a GPU, else over gloo.

    The ranks meet at `meeting`: a file on this machine that does not exist yet, or tcp://HOST:PORT with a free port of
    rank 0's host. The default device is the GPU with the number `rank` if there are GPUs, else the CPU.
    """
    device = device or (torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu"))
    own_gpu = device if device.type == "cuda" else None
    if own_gpu:
        torch.cuda.set_device(own_gpu)
    backend = "nccl" if own_gpu else "gloo"
    where = meeting if "://" in meeting else f"file://{meeting}"
    dist.init_process_group(backend, where, rank=rank, world_size=world, device_id=own_gpu)
    try:
        yield Ranks.current(device)
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
