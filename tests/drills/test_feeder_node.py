"""A node that feeds is lost, with the batches that it had made: another one feeds on, and no batch changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_nodes

from cpcscale.shards.index import Index
from cpcscale.storage import StorageConfig
from cpcscale.stream.feed import FeedConfig, FeedSource, ThreadFeed
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows

# Long windows: Ray hands small results over by another way, and they would not be lost.
SPEC, LANES, STEPS = WindowConfig(kind="tile", seconds=2.0), 3, 12


@pytest.fixture
def nodes() -> Iterator[tuple[Any, list[Any]]]:
    """A Ray of three nodes: the head, which may not feed, and two that may."""
    with ray_nodes.cluster(head_cpus=2, connect=True) as cluster:
        yield cluster, [cluster.add_node(num_cpus=1, resources={"feeder": 1}) for _ in range(2)]


def test_a_node_that_is_lost_with_its_batches_is_replaced_and_no_batch_changes(shard_set: Path, nodes: Any) -> None:
    import ray

    from cpcscale.cluster.feeders import ActorFeed

    cluster, feeding = nodes
    index = Index.load(str(shard_set))
    order = RunOrder(shard_windows(index, SPEC), 7, LANES, 2 * LANES)
    source = FeedSource(index, order, SPEC, FeedConfig(actor_resource="feeder"))
    threads = ThreadFeed(source, range(LANES), 0, threads=1)
    expected = [threads.next() for _ in range(STEPS)]
    threads.close()
    feed = ActorFeed(source, range(LANES), 0, StorageConfig())
    for step, batch in enumerate(expected):
        if step == 4:
            # Batches are made ahead: they lie in the store of the node that goes.
            references = [reference for _, reference in feed._feeders[0]._asked]
            ray.wait(references, num_returns=len(references), timeout=60, fetch_local=False)
            [used] = {node["NodeID"] for node in ray.nodes() if node["Alive"] and not _is_free(node["NodeID"])}
            [lost] = [node for node in feeding if node.node_id == used]
            cluster.remove_node(lost, allow_graceful=False)
        got = feed.next()
        for name in ("wave_BS", "samples_B", "key_B", "group_B", "utterance_B", "number_B"):
            np.testing.assert_array_equal(getattr(got, name), getattr(batch, name), err_msg=name)
    feed.close()


def _is_free(node: str) -> bool:
    """Whether a node has no feeder: nobody holds a unit of the resource there."""
    from ray._private.state import available_resources_per_node, total_resources_per_node

    have, free = total_resources_per_node()[node], available_resources_per_node().get(node, {})
    return have.get("feeder", 0) == free.get("feeder", 0)
