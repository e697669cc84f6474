"""The tracked run of a driver that holds the lease of its run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from cpcscale.runs.lease import Lease
from cpcscale.tracking.tracker import Tracker, TrackingConfig, environment_tags


@contextlib.contextmanager
def tracked_run(
    tracking: TrackingConfig,
    lease: Lease,
    run_dir: str,
    *,
    kind: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> Iterator[tuple[Tracker, dict[str, float]]]:
    """Starts a tracked run for the `with` block; yields its tracker and a dict to fill with summary metrics.

    The run ends as FINISHED, KILLED (on Ctrl-C or SIGTERM) or FAILED. If another driver took the lease over meanwhile,
    the run is that driver's, and is left as it is.
    """
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
        if lease.held(now=True):
            tracker.finish(status, summary if status == "FINISHED" else {})
