"""A Ray of several nodes on this machine, which notices within seconds that one is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def cluster(*, head_cpus: int, connect: bool) -> Iterator[Any]:
    """Its head, to which nodes are added, for the block; `connect` makes this process a driver of it."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0")):
            patch.setenv(name, value)
        quick = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 2000}
        head = {"num_cpus": head_cpus, "include_dashboard": False, "_system_config": quick}
        made = Cluster(initialize_head=True, connect=connect, head_node_args=head)
        try:
            yield made
        finally:
            if connect:
                ray.shutdown()
            made.shutdown()
