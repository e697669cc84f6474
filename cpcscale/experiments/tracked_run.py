"""The tracked run of a driver: it never stays RUNNING when the driver ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from cpcscale.cluster import ray_loss
from cpcscale.runs.lease import Lease
from cpcscale.tracking.outbox import always
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker, environment_tags


@contextlib.contextmanager
def tracked_run(
    tracking: TrackingConfig,
    lease: Lease | None,
    run_dir: str,
    *,
    kind: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    parent: str | None = None,
) -> Iterator[tuple[Tracker, dict[str, float]]]:
    """Starts a tracked run for the `with` block; yields its tracker and a dict to fill with summary metrics.

    The run ends as FINISHED; as KILLED where the process was asked to end (Ctrl-C, a signal of ENDING, exit); as FAILED
    after any other error. After a process that could do nothing any more, the next start in `run_dir` ends it (settle).
    If another driver took the `lease` of the folder over, the run is that driver's, and is left as it is.
    """
    tracker = Tracker.start(
        tracking,
        kind=kind,
        name=name,
        run_dir=run_dir,
        tags=environment_tags() | dict(tags),
        params=params,
        parent=parent,
        allowed=lease.held if lease else always,
    )
    status: str = "FAILED"
    summary: dict[str, float] = {}

    def finish() -> None:
        if lease is None or lease.held(now=True):
            tracker.finish(status, summary if status == "FINISHED" else {})

    with ray_loss.guarded(end=finish):
        try:
            # A death of Ray interrupts the block as Ctrl-C does, and is no request to end.
            with ray_loss.guarded():
                yield tracker, summary
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            finish()
