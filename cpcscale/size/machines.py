"""The machines that a pretraining is sized for, as the command line names them."""

from __future__ import annotations

from dataclasses import dataclass

from cpcscale import config as configs
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.errors import UserError
from cpcscale.stream.lanes import lanes_of_rank


@dataclass(frozen=True)
class Machines:
    """Nodes that are alike. Every GPU has a worker; without GPUs the config's `workers` are spread over the nodes."""

    nodes: int
    gpus_per_node: int
    cores_per_node: int
    # What a node reads from the object store, in MB/s; 0: not known.
    store_mb_per_s: float
    # Of a node's network card, both ways.
    network_gbit_per_s: float

    def __post_init__(self) -> None:
        configs.at_least(1, **{"--nodes": self.nodes, "--cores-per-node": self.cores_per_node})
        configs.at_least(0, **{"--gpus-per-node": self.gpus_per_node, "--store-mb-s": self.store_mb_per_s})
        if self.network_gbit_per_s <= 0:
            raise UserError(f"--network-gbit-s={self.network_gbit_per_s:g} moves nothing: give more than 0")

    def workers(self, config: PretrainConfig) -> int:
        """How many workers that makes. Raises UserError where some would have no lane, or no node."""
        workers = self.nodes * self.gpus_per_node or config.most_workers
        if workers < self.nodes:
            raise UserError(
                f"workers={config.workers} leave some of --nodes={self.nodes} without one: raise workers, lower "
                "--nodes, or give --gpus-per-node"
            )
        lanes_of_rank(config.train.lanes, 0, workers)
        return workers

    def on_node(self, config: PretrainConfig) -> int:
        """The most workers that a node has."""
        return -(-self.workers(config) // self.nodes)
