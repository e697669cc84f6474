"""The tracked run of a driver that holds a lease: it ends as the driver's work does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from cpcscale.runs.lease import Lease
from cpcscale.tracking.tracker import Tracker, TrackingConfig, environment_tags


@contextlib.contextmanager
def tracked(
    tracking: TrackingConfig,
    lease: Lease,
    run_dir: str,
    *,
    kind: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> Iterator[tuple[Tracker, dict[str, float]]]:
    """The parent run for the block, and a summary to fill. It ends FINISHED, KILLED or FAILED as the block does."""
    tracker = Tracker.start(
        tracking,
        kind=kind,
        name=name,
        run_dir=run_dir,
        tags=environment_tags() | dict(tags),
        params=params,
        allowed=lease.held,
    )
    status: str = "FAILED"
    summary: dict[str, float] = {}
    try:
        yield tracker, summary
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        # The tracked run is another driver's when this one was overtaken.
        if lease.held(now=True):
            tracker.finish(status, summary if status == "FINISHED" else {})
