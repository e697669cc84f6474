"""The machines that a pretraining is sized for, from the options of `cpcscale size`."""

from __future__ import annotations

from dataclasses import dataclass

from cpcscale import config as configs
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.errors import UserError
from cpcscale.stream.lanes import lanes_of_rank


@dataclass(frozen=True)
class Machines:
    """Identical nodes. Every GPU gets a worker; without GPUs the config's `workers` are spread over the nodes."""

    nodes: int
    gpus_per_node: int
    cores_per_node: int
    # Rate at which a node reads from the object store, in MB/s; 0: not known.
    store_mb_per_s: float
    # Rate of a node's network card in each direction.
    network_gbit_per_s: float

    def __post_init__(self) -> None:
        configs.at_least(1, **{"--nodes": self.nodes, "--cores-per-node": self.cores_per_node})
        configs.at_least(0, **{"--gpus-per-node": self.gpus_per_node, "--store-mb-s": self.store_mb_per_s})
        if self.network_gbit_per_s <= 0:
            raise UserError(f"--network-gbit-s={self.network_gbit_per_s:g} is not a rate: give more than 0")

    def workers(self, config: PretrainConfig) -> int:
        """The number of workers. Raises UserError if a worker would have no lane, or a node no worker."""
        workers = self.nodes * self.gpus_per_node or config.most_workers
        if workers < self.nodes:
            raise UserError(
                f"workers={config.workers} leave some of --nodes={self.nodes} without a worker: raise workers, lower "
                "--nodes, or give --gpus-per-node"
            )
        lanes_of_rank(config.train.lanes, 0, workers)
        return workers

    def workers_per_node(self, config: PretrainConfig) -> int:
        """The number of workers on the fullest node."""
        return -(-self.workers(config) // self.nodes)
