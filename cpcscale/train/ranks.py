"""The one door to torch.distributed: what the ranks of a run say to each other. Alone, every call is the identity."""

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

# Words of gloo's errors, which have no type of their own.
_GLOO = ("gloo", "Connection closed by peer", "Connection reset by peer")


class PeerLostError(RuntimeError):
    """Another rank is gone, and with it what this one was to do with it."""


@dataclass(frozen=True)
class Ranks:
    """This process among the `world` ranks of a run; `on_node` ranks share its machine.

    Tensors on the CPU and plain values go between the hosts, over `hosts`: no rank waits for its GPU to say them.
    """

    rank: int
    world: int
    on_node: int
    device: torch.device
    # None: the default group, which is of hosts where no rank has a GPU.
    hosts: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, device: torch.device | None = None) -> Ranks:
        """The ranks of the process group that Ray Train, torchrun or a test has set up; one rank without a group.

        `device` is what the launcher gives this rank; by default the GPU of its LOCAL_RANK, or the CPU. All ranks call
        this together.
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
            # Newer versions have the flag by another name, which older ones lack.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            # Buffers follow from the config and the data alone.
            wrapped = DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
        if self.device.type == "cpu":
            # On a GPU each sample waits for it: there, one pass in 100 as by default.
            wrapped._set_ddp_runtime_logging_sample_rate(1)
        return wrapped

    def exchange_s(self, module: nn.Module) -> tuple[float, float]:
        """Seconds so far of the gradients' exchange by a `wrapped` module, and those that no backward pass covered.

        Those of the last pass are not in it yet.
        """
        if not isinstance(module, DistributedDataParallel):
            return 0.0, 0.0
        said = module._get_ddp_logging_data()
        passes = 1e-9 * float(said.get("iteration", 0))
        took, covered = (
            passes * float(said.get(f"avg_backward_{name}_time", 0)) for name in ("comm", "compute_comm_overlap")
        )
        return took, took - covered

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over ranks, on every rank."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, group=self._group(values))
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest of `values` over ranks, on every rank."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group(values))
        return values

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, slice]:
        """[R, ...]: the rows of all ranks, rank by rank, each rank's padded with zeros to as many as the longest has.

        And which of them are this rank's. Without gradient.
        """
        if self.world == 1:
            return rows, slice(0, len(rows))
        count = int(self.max(torch.tensor(len(rows))))
        mine = torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
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
        """Turns what the block fails with because another rank is gone into a PeerLostError."""
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
    """Within the block this process is one of `world` ranks, over NCCL where its `device` is a GPU, else over gloo.

    They meet at the file `meeting` of this machine, which is not there yet, or at tcp://HOST:PORT, a free port of rank
    0's. Without a `device` it is the GPU of this number where there are GPUs, else the CPU.
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
