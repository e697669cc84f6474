"""What `cpcscale size` prints: the speed, bottleneck and memory of a pretraining on given machines."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

_SPENT = {
    "update": "the update",
    "decode": "decoding",
    "store": "the object store",
    "network": "the network",
}
_OUT = {
    "update": "more or faster devices make it shorter",
    "decode": "more cores (feed.decode_threads), or feed.kind=actors on other nodes, make it shorter",
    "store": "a larger feed.cache.max_gb, or a faster store, makes it shorter",
    "network": "a faster network, or fewer nodes with a larger train.batch, makes it shorter",
}


def size_lines(values: Mapping[str, Any], given: tuple[str, ...]) -> list[str]:
    """The lines of `cpcscale size`; `given` names the rates that the user gave, which were not measured."""
    found = SimpleNamespace(**values)
    speech, reading = SimpleNamespace(**values["speech"]), SimpleNamespace(**values["reading"])
    measured = {name: "given" if name in given else "measured here" for name in ("update", "decode")}
    side = ", ".join(f"{_SPENT[name]} {seconds:.3g} s" for name, seconds in found.steps_s.items() if seconds)
    lines = [
        f"{speech.hours:,.2f} h in {speech.windows:,} windows and {speech.shards:,} shards, {speech.gb:,.3g} GB; "
        f"{found.steps:,} steps, {speech.steps_per_epoch:,} an epoch",
        f"  workers        {found.workers:,} of {found.windows_per_worker:,} windows a step; {found.lanes_per_node:,} "
        f"lanes a node, {speech.shards_per_lane:,.3g} shards a lane; about {found.memory_mib:,.0f} MiB in fp32 each",
        f"  speed          a worker updates on {found.update_audio_s_per_s:,.1f} audio s/s ({measured['update']}), a "
        f"core decodes {found.decode_audio_s_per_s:,.0f} ({measured['decode']})",
        f"  a step         {found.step_s:.3g} s: {side}, in parallel",
        f"  bottleneck     {_SPENT[found.bottleneck]}: {_OUT[found.bottleneck]}",
        f"  the run        {_time(found.run_hours)}, {_time(found.validation_s / 3600)} of it validation; "
        f"{found.worker_hours:,.3g} worker hours; {found.audio_s_per_s:,.1f} audio s/s",
        f"  decoding       {found.decode_cores_per_node:,.2g} core(s) a node are enough for its workers, or "
        f"{found.feeders_per_worker:,} feeder(s) a worker with feed.kind=actors",
    ]
    if reading.cache_gb:
        lines += [
            f"  object store   {reading.mb_per_s:,.3g} MB/s a node, {reading.later_mb_per_s:,.3g} with a full cache",
            f"  cache          {reading.cache_least_gb:,.3g} GB a node at least; "
            f"feed.cache.max_gb={reading.cache_gb:g} holds {reading.cache_share:.0%} of the set",
        ]
    return [
        *lines,
        f"  checkpoints    {found.checkpoint_mb:,.3g} MB every {_time(found.checkpoint_every_s / 3600)}; gradients of "
        f"{found.gradient_mb:,.3g} MB a step",
    ]


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours >= 1 / 60 else f"{hours * 3600:.1f} s"
