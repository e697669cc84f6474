"""The audit of a shard set: one task for each tar, with totals whose memory does not grow with the set."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpcscale import config, storage
from cpcscale.cluster.tasks import stream_tasks
from cpcscale.errors import UserError
from cpcscale.shards import audit as shards
from cpcscale.shards.audit import ShardAudit
from cpcscale.shards.audit_totals import AuditTotals
from cpcscale.shards.index import Index
from cpcscale.shards.tasks import RunTasks
from cpcscale.stream import shuffle_quality, window, window_counts
from cpcscale.stream.lanes import PADDING
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig


@dataclass(kw_only=True)
class AuditConfig:
    """What an audit checks beside the hashes, and the training plan whose shuffle it measures."""

    # Share of members that is decoded, chosen by the seed.
    share: float = 1.0
    # Seed of the share and of the plan.
    seed: int = 0
    # train.lanes of the plan.
    lanes: int = 64
    # train.batch of the plan.
    batch: int = 64
    window: WindowConfig = field(default_factory=WindowConfig)
    # Batches of an epoch whose shuffle is measured; all, if the epoch has no more.
    batches: int = 100

    def __post_init__(self) -> None:
        config.at_least(0, share=self.share)
        config.at_least(1, lanes=self.lanes, batch=self.batch, batches=self.batches)
        if self.share > 1:
            raise UserError(f"share={self.share} is above 1, which already is every member: give 1 or less")
        if self.batch % self.lanes:
            raise UserError(
                f"batch={self.batch} is not a multiple of lanes={self.lanes}: every lane gives the same number of rows"
            )


def audit(base: str, spec: AuditConfig, run: RunTasks = stream_tasks) -> dict[str, Any]:
    """Checks every tar of the set at `base`. Returns its contents and problems as plain values; `ok` is false for any.

    Raises UserError for a folder that is not a shard set; problems of its shards are in the result.
    """
    index = Index.load(storage.absolute(base))
    with tempfile.TemporaryDirectory() as folder:
        tally = AuditTotals(index, Path(folder))
        every = range(index.shards.num_rows)
        for done, recording, windows in run(_audit, every, what="auditing", unit="tars", shared=(index, spec)):
            tally.add(done, recording, windows)
        result = tally.result(storage.list_files(index.base))
        _, total, same = tally.windows_by_recording
    result["share"] = spec.share
    result["shuffle"] = _shuffle(index, spec, total, same, run)
    return result


def _audit(shard: int, index: Index, spec: AuditConfig) -> tuple[ShardAudit, np.ndarray, np.ndarray]:
    """(the audit of a tar, the hash of each recording in it, the number of windows of each recording in this tar)."""
    done = shards.audit_shard(index, shard, spec.share, spec.seed)
    windows = window.count(spec.window, done.samples[done.counts])
    recording, at = np.unique(done.recording[done.counts], return_inverse=True)
    return done, recording, np.bincount(at, weights=windows, minlength=len(recording)).astype(np.int64)


def _shuffle(index: Index, spec: AuditConfig, windows: int, same: int, run: RunTasks) -> dict[str, Any]:
    """How well the plan shuffles the first epoch (see shuffle_quality), or `why` that could not be measured."""
    plan = {"lanes": spec.lanes, "batch": spec.batch, "window": f"{spec.window.kind} {spec.window.seconds:g} s"}
    try:
        by_shard = window_counts.shard_windows(index, spec.window)
        steps_all = RunOrder(by_shard, spec.seed, spec.lanes, spec.batch).lanes.steps_per_epoch
        steps = shuffle_quality.sample_steps(steps_all, spec.batches, spec.seed)
        pieces = np.array_split(steps, min(len(steps), 64))
        shared = index, spec, by_shard
        found = [row for rows in run(_pairs, pieces, what="shuffle", unit="parts", shared=shared) for row in rows]
    except UserError as error:
        return {**plan, "why": str(error)}
    figure = shuffle_quality.shuffle_quality(found, windows, same, exact=len(steps) == steps_all)
    return {
        **plan,
        "pairs": figure.pairs,
        "perfect": figure.perfect,
        "ratio": figure.ratio,
        "error": figure.error,
        "batches": figure.batches,
        "exact": figure.exact,
    }


def _pairs(steps: np.ndarray, index: Index, spec: AuditConfig, by_shard: np.ndarray) -> list[tuple[int, int]]:
    """(number of rows, number of pairs from the same recording) of the global batch of each of these steps."""
    order = RunOrder(by_shard, spec.seed, spec.lanes, spec.batch)
    return [_pairs_of(index, spec, *order.rows(step, range(spec.lanes))[1:]) for step in steps.tolist()]


def _pairs_of(index: Index, spec: AuditConfig, shard_B: np.ndarray, ordinal_B: np.ndarray) -> tuple[int, int]:
    recordings = []
    for shard in np.unique(shard_B[shard_B != PADDING]).tolist():
        rows = index.rows(shard)
        row, _ = window.locate(window.count(spec.window, rows.samples), ordinal_B[shard_B == shard])
        row = row[~rows.excluded[row]]
        recordings.append(shards.hashes(rows.table["recording"].take(row)))
    batch = np.concatenate([np.zeros(0, np.uint64), *recordings])
    return len(batch), shuffle_quality.count_pairs(batch)
