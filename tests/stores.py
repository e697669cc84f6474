"""MLflow stores for tests: copies of one that MLflow made, which takes it three seconds of a core each time."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import mlflow


def store(folder: Path) -> str:
    """The address of the store `mlflow.db` in `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mlflow.db"
    if not file.exists():
        file.write_bytes(_new())
    return f"sqlite:///{file}"


@functools.cache
def _new() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mlflow.db")
        mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
        return file.read_bytes()
