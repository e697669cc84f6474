"""Writes runs to MLflow: one MLflow run for one run folder, across restarts.

outbox.py ensures that a resumed run never logs a step twice; runs.py reads what is written here.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cpcscale import storage
from cpcscale.config import check_choice, redact, redacted
from cpcscale.errors import UserError
from cpcscale.tracking import run_note
from cpcscale.tracking.outbox import Outbox, Record, StoreAwayError, always

logger = logging.getLogger(__name__)

LOCAL_URI = "sqlite:///runs/mlflow.db"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
PARENT_TAG = "mlflow.parentRunId"
_VALUE_CHARACTERS = 6000  # MLflow's limit for a parameter; a tag may have 8000.

# An absent server costs seconds instead of minutes; no telemetry; no URL on stdout, where --json prints JSON alone.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
for _key, _default in _ENVIRONMENT.items():  # MLflow reads them when it is imported, later, inside functions.
    os.environ.setdefault(_key, _default)
# Loggers that are silenced: they print at length what this module reports in one line.
_CHATTER = ("mlflow", "alembic", "urllib3.connectionpool")
# Error codes that may pass, or that are about this client: with any other, the store refuses the record for good.
_MAY_PASS = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"}
_MAY_PASS |= {"DEADLINE_EXCEEDED", "RESOURCE_CONFLICT", "PERMISSION_DENIED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND"}


class StoreError(UserError):
    """The tracking store cannot be used: wrong address, absent server, broken or unwritable file."""


@dataclass
class TrackingConfig:
    """The MLflow store and experiment that runs are tracked in."""

    # The MLflow experiment that all runs share.
    experiment: str = "cpcscale"
    # The store's address; empty: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db below the current folder.
    uri: str = ""

    def __post_init__(self) -> None:
        if not self.experiment.strip():
            raise UserError("tracking.experiment is empty: name the MLflow experiment, for example cpcscale")

    def resolved(self) -> TrackingConfig:
        """The same store with its address absolute, for a process with another working directory."""
        return TrackingConfig(self.experiment, store_uri(self))


class Tracker:
    """One MLflow run, open for writing. Only `start` raises when the store is away; records are kept and sent later."""

    def __init__(self, client: Any, run_id: str, run_dir: str | None, allowed: Callable[[], bool] = always) -> None:
        self.run_id = run_id
        self._sink = _MlflowSink(client, run_id)
        self._unsent_url = storage.join(run_dir, "unsent.json") if run_dir else None
        self._outbox = Outbox(run_id, self._sink, self._unsent_url, allowed)

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        *,
        kind: str,
        name: str,
        run_dir: str | None,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        parent: str | None = None,
        patient: bool = False,
        allowed: Callable[[], bool] = always,
    ) -> Tracker:
        """Opens the run named in `run_dir/run.json` if the store still has it, else creates one and names it there.

        A copied folder gets a new run that names its origin. Raises UserError if the folder's run is of another kind.

        Tags are overwritten. Params keep their first value; those that have changed are listed in the tag
        `cpcscale.changed`. Raises StoreError when the store cannot be used, unless `patient` and the run exists: then
        its records wait for the store. Nothing is sent or kept while `allowed()` is false.
        """
        known_id, copied = run_note.read_own(run_dir, kind) if run_dir else (None, {})
        try:
            client, experiment_id = _prepare(config)
            with store_errors(config):
                # Created with its kind, so that a run whose driver is killed right now is still listed.
                first = {"cpcscale.kind": kind} | ({PARENT_TAG: parent} if parent else {})
                run = _active_run(client, known_id) or client.create_run(experiment_id, run_name=name, tags=first)
                _describe(client, run, {**tags, **copied, "cpcscale.kind": kind}, params)
        except StoreError as error:
            if not (patient and known_id):
                raise
            logger.warning("%s; the run goes on and its records wait", error)
            return cls(connect(config), known_id, run_dir, allowed)
        if run_dir:
            run_note.write(run_dir, run.info.run_id, kind, name, config.experiment)
        return cls(client, run.info.run_id, run_dir, allowed)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues the values of one step, to be sent within about 2 s. Keys that already have this step are skipped."""
        now_ms = int(time.time() * 1000)
        self._outbox.put([(key, float(value), now_ms, int(step)) for key, value in metrics.items()])

    def tag(self, name: str, value: str) -> None:
        """Sets the tag `cpcscale.NAME`. A tag is lost when the store is away: keep its content elsewhere too."""
        with contextlib.suppress(StoreAwayError):
            self._sink.send_tag(f"cpcscale.{name}", _shown(name, value))

    def artifact(self, name: str, data: str | bytes) -> None:
        """Queues one file (`name` may be a path below the run's artifacts); replaces a file of the same name."""
        self._outbox.put_artifact(name, data.encode() if isinstance(data, str) else data)

    def flush(self) -> bool:
        """Sends all records. Returns False if that fails; they are then in `run_dir/unsent.json` for the next start.

        Called when a checkpoint is published, so that the records up to that step survive the process.
        """
        return self._outbox.flush()

    def finish(self, status: str, summary: Mapping[str, float] | None = None) -> None:
        """Sends the rest and closes the run as FINISHED, FAILED or KILLED; waits at most about 20 s for the store.

        Summary values are logged at the run's last step, or one step later if the key has another value there.
        """
        check_choice("status", status, ("FINISHED", "FAILED", "KILLED"))
        values = {key: float(value) for key, value in (summary or {}).items()}
        if not self._outbox.close(lambda: self._sink.end(status, values)):
            kept = f"kept in {self._unsent_url} for the next start" if self._unsent_url else "lost (it has no run_dir)"
            logger.warning("the tracking store is still away: the last records of run %s are %s", self.run_id, kept)


def environment_tags() -> dict[str, str]:
    """Tags for reproducing a run: git commit and dirty flag (in a checkout), versions, platform."""
    tags = {"cpcscale.python": platform.python_version(), "cpcscale.platform": platform.platform()}
    for package in ("cpcscale", "torch", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            tags["cpcscale.version" if package == "cpcscale" else f"cpcscale.{package}"] = version(package)
    for folder in (Path(__file__).parent, Path.cwd()):
        if (commit := _git(folder, "rev-parse", "HEAD")) is not None:
            dirty = _git(folder, "status", "--porcelain")
            return tags | {"cpcscale.git_commit": commit, "cpcscale.git_dirty": str(dirty != "").lower()}
    return tags


class _MlflowSink:
    """Stores the records of one run; a record that the store refuses for good is dropped with a warning."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def last_values(self) -> dict[str, tuple[int, float]]:
        with _send_errors("the last values"):
            return last_values_of(self._client.get_run(self._run_id))
        return {}

    def send_values(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        with _send_errors(f"{len(records)} metric values"):
            metrics = [Metric(key, value, at_ms, step) for key, value, at_ms, step in records]
            self._client.log_batch(self._run_id, metrics=metrics)

    def send_tag(self, key: str, value: str) -> None:
        with _send_errors(f"the tag {key}"):
            self._client.set_tag(self._run_id, key, value)

    def send_artifact(self, name: str, data: bytes) -> None:
        import tempfile

        folder, _, file_name = name.rpartition("/")
        with tempfile.TemporaryDirectory() as place, _send_errors(f"the artifact {name}"):
            Path(place, file_name).write_bytes(data)
            self._client.log_artifact(self._run_id, str(Path(place, file_name)), folder or None)

    def end(self, status: str, summary: dict[str, float]) -> None:
        last = self.last_values()  # A worker process may have logged to this run meanwhile.
        top, now_ms = max((step for step, _ in last.values()), default=0), int(time.time() * 1000)
        records: list[Record] = []
        for key, value in summary.items():
            step, known = last.get(key, (-1, None))
            if known is None or not (known == value or (math.isnan(known) and math.isnan(value))):
                records.append((key, value, now_ms, max(top, step + 1)))
        self.send_values(records)
        with _send_errors("the final status"):
            self._client.set_terminated(self._run_id, status)


def store_uri(config: TrackingConfig) -> str:
    """The address of the store, a local one made absolute. Raises StoreError if MLflow does not take it."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or LOCAL_URI
    scheme, separator, rest = uri.partition("://")
    if (not separator and scheme != "databricks") or scheme.split("+")[0] not in _SCHEMES:
        raise StoreError(
            f"tracking store {redact(uri)!r} is not an address that MLflow takes: write sqlite:///PATH/mlflow.db "
            f"or http://HOST:PORT"
        )
    return f"sqlite:///{storage.absolute(rest.removeprefix('/'))}" if scheme == "sqlite" else uri


def sqlite_path(uri: str) -> Path | None:
    """The file of a local store; None for any other store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def connect(config: TrackingConfig) -> Any:
    """An MLflow client of the store. It has no active run, so threads and runs do not interfere."""
    from mlflow.tracking import MlflowClient

    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(store_uri(config))


def _prepare(config: TrackingConfig) -> tuple[Any, str]:
    """(client, id of the experiment). Creates the tables of a local store, one process at a time."""
    path = sqlite_path(store_uri(config))
    if path and storage.in_job_folder(path):
        logging.getLogger(__name__).warning(
            "the tracking store %s lies in the job's temporary folder: name one by MLFLOW_TRACKING_URI to keep it", path
        )
    with store_errors(config), _locked(path) if path else contextlib.nullcontext():
        client = connect(config)
        return client, _experiment(client, config.experiment, path)


def _experiment(client: Any, name: str, path: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    # Absolute, so that a local store keeps artifacts beside its database wherever a command is run from.
    artifacts = str(path.parent / "mlartifacts") if path else None
    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise StoreError(f"experiment {name!r} is deleted in the tracking store: restore it or set tracking.experiment")
    return str(experiment.experiment_id)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of an sqlite file. Refuses a file of another kind, which MLflow would retry for minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(15) != b"SQLite format 3":
                raise StoreError(f"tracking store {path} is not an sqlite file: move it away or name another store")
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def store_errors(config: TrackingConfig) -> Iterator[None]:
    """Turns the errors of MLflow and its store into a StoreError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise StoreError(
            f"tracking store {redact(store_uri(config))} cannot be used ({_brief(error)}): start or repair it, or "
            f"unset MLFLOW_TRACKING_URI and tracking.uri for the local {LOCAL_URI}"
        ) from None


@contextlib.contextmanager
def _send_errors(what: str) -> Iterator[None]:
    """Turns the errors of a store into StoreAwayError; if it refuses a record for good, warns and drops the record."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except ImportError as error:  # A client library for the store's artifact location is missing here.
        logger.warning("the tracking store cannot take %s: %s", what, _brief(error))
    except (MlflowException, OSError) as error:
        if getattr(error, "error_code", "INTERNAL_ERROR") in _MAY_PASS:
            raise StoreAwayError(_brief(error)) from None
        logger.warning("the tracking store refuses %s: %s", what, _brief(error))


def _active_run(client: Any, run_id: str | None) -> Any | None:
    """The run, set to RUNNING again, or None when the store no longer has it."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    if run.info.lifecycle_stage != "active":
        return None
    client.update_run(run_id, status="RUNNING")
    return run


def _describe(client: Any, run: Any, tags: Mapping[str, str], params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param, RunTag

    wanted = {key: _shown(key, value) for key, value in params.items()}
    changed = sorted(key for key, value in run.data.params.items() if wanted.get(key, value) != value)
    if changed:
        tags = {**tags, "cpcscale.changed": ", ".join(changed)}
    client.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in wanted.items() if key not in run.data.params],
        tags=[RunTag(key, _shown(key, value)) for key, value in tags.items()],
    )


def _shown(key: str, value: Any) -> str:
    """A value as it is stored: secrets replaced, cut to the length that MLflow takes."""
    return redact(str(redacted(key, value)))[:_VALUE_CHARACTERS]


def read_artifact(client: Any, run_id: str, name: str) -> bytes | None:
    """The bytes of one of a run's artifacts, or None when there is no such file."""
    import tempfile

    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(MlflowException, OSError):
        return Path(client.download_artifacts(run_id, name, folder)).read_bytes()
    return None


def last_values_of(run: Any) -> dict[str, tuple[int, float]]:
    """Step and value of the newest record of each metric of an MLflow run."""
    # Through the message form, because `data.metrics` leaves the steps out.
    return {metric.key: (metric.step, decode_value(metric.value)) for metric in run.data.to_proto().metrics}


def decode_value(stored: float) -> float:
    """The value that was logged: MLflow stores an infinity as the largest float of its sign."""
    return math.copysign(math.inf, stored) if abs(stored) >= sys.float_info.max else stored


def _git(folder: Path, *arguments: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def _brief(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return "it does not answer" if "ConnectionPool(" in text else redact(text.splitlines()[0][:200])
