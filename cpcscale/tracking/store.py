"""The MLflow store: its address, its experiment, and its errors as one line."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpcscale import storage
from cpcscale.config import redact
from cpcscale.errors import UserError
from cpcscale.storage.locks import lock

logger = logging.getLogger(__name__)

# Without a kind, an experiment is shown on MLflow's pages for language models.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
LOCAL_URI = "sqlite:///runs/mlflow.db"
_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")

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


def store_uri(config: TrackingConfig) -> str:
    """The address of the store, a local one made absolute. Raises StoreError if MLflow does not take it."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or LOCAL_URI
    scheme, separator, _ = uri.partition("://")
    if (not separator and scheme != "databricks") or scheme.split("+")[0] not in _SCHEMES:
        raise StoreError(
            f"tracking store {redact(uri)!r} is not an address that MLflow takes: write sqlite:///PATH/mlflow.db "
            f"or http://HOST:PORT"
        )
    if not (path := sqlite_path(uri)):
        return uri
    from sqlalchemy.engine import make_url

    # Rendered with escapes: a path may hold a %, ? or #.
    return make_url(uri).set(database=str(path)).render_as_string(hide_password=False)


def sqlite_path(uri: str) -> Path | None:
    """The file of a local store, absolute, as SQLAlchemy reads its address; None for any other store."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    name = make_url(uri).database
    if not name or name == ":memory:":
        raise StoreError(f"tracking store {uri} ends with the process: name a file, sqlite:///PATH/mlflow.db")
    return Path(storage.absolute(name))


def connect(config: TrackingConfig) -> Any:
    """An MLflow client of the store. It has no active run, so threads and runs do not interfere."""
    from mlflow.tracking import MlflowClient

    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(store_uri(config))


def prepare(config: TrackingConfig) -> tuple[Any, str]:
    """(client, id of the experiment). Creates the tables of a local store, one process at a time."""
    path = sqlite_path(store_uri(config))
    if path and storage.in_job_folder(path):
        logger.warning(
            "the tracking store %s lies in the job's temporary folder: name one by MLFLOW_TRACKING_URI to keep it", path
        )
    with store_errors(config), _locked(path) if path else contextlib.nullcontext():
        client = connect(config)
        return client, _experiment(client, config.experiment, path)


def check_store(config: TrackingConfig) -> None:
    """Writes a run with a value and a file to the store, reads them back, and deletes the run. Raises StoreError."""
    client, experiment_id = prepare(config)
    with store_errors(config):
        run_id = client.create_run(experiment_id, run_name="doctor", tags={"cpcscale.kind": "doctor"}).info.run_id
        try:
            client.log_metric(run_id, "value", 0.5)
            if client.get_run(run_id).data.metrics != {"value": 0.5}:
                raise StoreError(f"tracking store {redact(store_uri(config))} does not give back what was written")
            try:
                client.log_text(run_id, "a file", "file.txt")
            except Exception as error:  # noqa: BLE001 (each library of a place for files raises errors of its own)
                where = redact(client.get_run(run_id).info.artifact_uri)
                raise StoreError(
                    f"files cannot be written to {where} ({brief(error)}): make it writable from here, or serve the "
                    "store with `mlflow server --artifacts-destination`"
                ) from None
        finally:
            client.set_terminated(run_id, "FINISHED")
            client.delete_run(run_id)


def _experiment(client: Any, name: str, path: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    # Absolute, so that a local store keeps artifacts beside its database wherever a command is run from.
    artifacts = str(path.parent / "mlartifacts") if path else None
    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=_KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        raise StoreError(f"experiment {name!r} is deleted in the tracking store: restore it or set tracking.experiment")
    for key in _KIND.keys() - experiment.tags.keys():
        client.set_experiment_tag(experiment.experiment_id, key, _KIND[key])
    return str(experiment.experiment_id)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of an sqlite file. Refuses a file of another kind, which MLflow would retry for minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(15) != b"SQLite format 3":
                raise StoreError(f"tracking store {path} is not an sqlite file: move it away or name another store")
    with path.with_name(f".{path.name}.lock").open("w") as file:
        lock(file.fileno())
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
            f"tracking store {redact(store_uri(config))} cannot be used ({brief(error)}): start or repair it, or "
            f"unset MLFLOW_TRACKING_URI and tracking.uri for the local {LOCAL_URI}"
        ) from None


def brief(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return "it does not answer" if "ConnectionPool(" in text else redact(text.splitlines()[0][:200])
