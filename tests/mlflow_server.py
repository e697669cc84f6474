"""A tracking server of MLflow for tests, which can be taken away."""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import store


class Server:
    """MLflow's own REST application on a port of this process: down and up again within milliseconds."""

    def __init__(self) -> None:
        self.port = free_port()
        self.up()

    def up(self) -> None:
        from mlflow.server import app
        from werkzeug.serving import make_server

        self._wait_for_port()
        self._server = make_server("127.0.0.1", self.port, app, threaded=True)
        self.port = self._server.port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _wait_for_port(self) -> None:
        """A program that this process starts has all its sockets until it runs, the one that listened among them."""
        for _ in range(100):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", self.port))
                return
            time.sleep(0.1)

    def down(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.down()
        try:
            yield
        finally:
            self.up()


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """One with its store in the folder; it keeps files itself, so that clients send and fetch them through it."""
    import mlflow.server as served

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(served.BACKEND_STORE_URI_ENV_VAR, store(folder))
        patch.setenv(served.ARTIFACT_ROOT_ENV_VAR, "mlflow-artifacts:/")
        patch.setenv(served.ARTIFACTS_DESTINATION_ENV_VAR, str(folder / "artifacts"))
        patch.setenv(served.SERVE_ARTIFACTS_ENV_VAR, "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        running = Server()
        yield running
        running.down()


def free_port() -> int:
    """One that stays free while its server is away: below those that others are given."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
