"""An MLflow server for the tests of what is tracked on one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mlflow_server import Server, running_server

from cpcscale.tracking.store import TrackingConfig


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def remote(server: Server, request: pytest.FixtureRequest) -> TrackingConfig:
    """An experiment of its own on it for each test."""
    return TrackingConfig(request.node.name, f"http://127.0.0.1:{server.port}")
