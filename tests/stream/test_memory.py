"""A feed's memory over many epochs: nothing that was used stays."""

from __future__ import annotations

import json

import pytest
from object_store import ObjectStore

from cpcscale import storage

EPOCHS = """
import json, sys
from cpcscale.shards.cache import CacheConfig
from cpcscale.shards.index import Index
from cpcscale.stream.window_counts import shard_windows
from cpcscale.stream.feed import FeedConfig, FeedSource, ThreadFeed
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig

base, folder, mode = sys.argv[1:]
index, spec = Index.load(base), WindowConfig(kind="tile", seconds=0.25)
order = RunOrder(shard_windows(index, spec), 0, 3, 6)
kept = CacheConfig(mode=mode, folder=folder, max_gb=0.0015 if mode == "shards" else 1, ahead=0)
feed = ThreadFeed(FeedSource(index, order, spec, FeedConfig(cache=kept)), range(3), 0, threads=2)
resident = []
for epoch in range(12):
    for _ in range(order.lanes.steps_per_epoch):
        feed.next()
    pages = open("/proc/self/statm").read().split()[1]
    resident.append(int(pages) * 4096 / 2**20)
feed.close()
print(json.dumps(resident))
"""


@pytest.mark.parametrize("mode", ["local", "ranged", "shards"])
def test_the_memory_of_a_feed_is_flat_over_ten_epochs(shard_set, tmp_path, s3: ObjectStore, run_python, mode):
    base = str(shard_set)
    if mode != "local":
        base = storage.join(s3.base, tmp_path.name)
        for path in shard_set.rglob("*"):
            if path.is_file():
                storage.write(storage.join(base, path.relative_to(shard_set).as_posix()), path.read_bytes())
    text = f"import sys; sys.argv[1:] = {[base, str(tmp_path / 'cache'), mode.replace('local', 'auto')]!r}\n{EPOCHS}"
    status, lines = run_python(text)
    assert status == 0, lines
    resident = json.loads(lines[-1])
    # Two epochs to warm up; then less than what one epoch decodes, 24 utterances of a second or so, would leave.
    assert max(resident[2:]) - resident[1] < 2.0, resident
