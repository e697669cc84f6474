"""Reads tracked runs from the store, for `cpcscale compare` and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cpcscale.config import redact
from cpcscale.errors import UserError
from cpcscale.tracking.store import TrackingConfig, connect, sqlite_path, store_errors, store_uri
from cpcscale.tracking.tracker import NAME_TAG, PARENT_TAG, decode_value, last_values_of, read_artifact


@dataclass(frozen=True)
class TrackedRun:
    """One run of the store; its metric histories and files are read on request."""

    run_id: str
    name: str
    # pretrain, finetune, sweep, trial, fold, reproduce or evaluate
    kind: str
    # RUNNING, FINISHED, FAILED or KILLED
    status: str
    experiment: str
    # Without MLflow's own tags.
    tags: dict[str, str]
    params: dict[str, str]
    # The last value of each key, and its step.
    metrics: dict[str, float]
    steps: dict[str, int]
    # Seconds since 1970.
    started_s: float
    ended_s: float | None
    parent: str | None
    # The number of runs that name this one as their parent.
    children: int
    client: Any = field(repr=False, compare=False)

    def history(self, key: str) -> list[tuple[int, float]]:
        """All (step, value) of a metric by rising step, with NaN and infinities; empty for an unknown key."""
        points = self.client.get_metric_history(self.run_id, key)
        return sorted((point.step, decode_value(point.value)) for point in points)

    def artifact(self, name: str) -> bytes | None:
        """The bytes of one of the run's artifacts, or None when there is no such file."""
        return read_artifact(self.client, self.run_id, name)

    def tag(self, name: str) -> str:
        """The value of the tag `cpcscale.NAME`, empty when it is not set."""
        return self.tags.get(f"cpcscale.{name}", "")


def read_runs(config: TrackingConfig, *, children: bool = False) -> list[TrackedRun]:
    """The runs of the experiment, newest first; trials and folds, which are parts of another run, only with `children`.

    A fine-tuning below a reproduction is listed in any case. Raises UserError when the store cannot be reached or holds
    no run of cpcscale.
    """
    uri = store_uri(config)
    nothing = UserError(
        f"no tracked runs in experiment {config.experiment!r} of {redact(uri)}: run `cpcscale pretrain` or "
        f"`cpcscale finetune` first, or name another store in MLFLOW_TRACKING_URI"
    )
    path = sqlite_path(uri)
    # Connecting would create the file.
    if path and not path.exists():
        raise nothing
    with store_errors(config):
        client = connect(config)
        experiment = client.get_experiment_by_name(config.experiment)
        found = list(_all_runs(client, experiment.experiment_id)) if experiment else []
    families = Counter(run.data.tags.get(PARENT_TAG) for run in found)
    runs = [_tracked(client, run, config.experiment, families[run.info.run_id]) for run in found]
    runs = sorted((run for run in runs if run.kind), key=lambda run: run.started_s, reverse=True)
    if not runs:
        raise nothing
    return [run for run in runs if children or not run.parent or run.kind == "finetune"]


def _all_runs(client: Any, experiment_id: str) -> Iterator[Any]:
    page = client.search_runs([experiment_id], max_results=1000)
    yield from page
    while page.token:
        page = client.search_runs([experiment_id], max_results=1000, page_token=page.token)
        yield from page


def _tracked(client: Any, run: Any, experiment: str, children: int) -> TrackedRun:
    last, info = last_values_of(run), run.info
    return TrackedRun(
        run_id=info.run_id,
        name=run.data.tags.get(NAME_TAG) or info.run_name or info.run_id[:8],
        kind=run.data.tags.get("cpcscale.kind", ""),
        status=info.status,
        experiment=experiment,
        tags={key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")},
        params=dict(run.data.params),
        metrics={key: value for key, (_, value) in last.items()},
        steps={key: step for key, (step, _) in last.items()},
        started_s=info.start_time / 1000,
        ended_s=info.end_time / 1000 if info.end_time else None,
        parent=run.data.tags.get(PARENT_TAG),
        children=children,
        client=client,
    )
