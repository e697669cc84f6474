"""Fixtures that tests of several rooms share: a real S3 server, a process with access to it, a packed shard set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty_store
import object_store
import pytest
import speech
from faulty_store import FaultyStore
from hypothesis import settings
from object_store import ObjectStore
from trees import corpus

from cpcscale import storage
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.storage import StorageConfig

# The machine may be busy with other work: no test fails for being slow, and every run tries the same examples.
settings.register_profile("cpcscale", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("cpcscale")

# A shell that starts pytest in the background has it ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Under nohup it ignores a hangup, and all that it starts would: a handler is not passed on, and spares this process.
signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call() -> None:
    # Processes for tasks are used again where the environment is the same, and this changes with every test.
    os.environ.pop("PYTEST_CURRENT_TEST", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-write", action="store_true", help="freeze the losses of tests/golden as they are now")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests and what they start have a cache of their own, which is empty, and leave the user's alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running S3 server; this process and those it starts can reach it."""
    with object_store.run_object_store(tmp_path_factory.mktemp("weed")) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def faulty_s3(s3: ObjectStore, tmp_path: Path) -> Iterator[FaultyStore]:
    """A proxy before the S3 server that fails as told; this process reaches the store through it, with short pauses."""
    base = f"{s3.base}/faulty/{tmp_path.name}"
    with faulty_store.in_front_of(s3.environment["AWS_ENDPOINT_URL"], base) as store:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", store.url)
                storage.configure(StorageConfig(backoff_base_s=0.01, backoff_cap_s=0.1))
                yield store
        finally:
            storage.configure(StorageConfig())


@pytest.fixture(scope="module", autouse=True)
def ray_ends_with_its_module() -> Iterator[None]:
    """A verb leaves Ray to the process, and the next module would get one of another size."""
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="module")
def ray_here(s3: ObjectStore) -> Iterator[None]:
    """A small Ray on this machine, whose workers can reach the S3 server."""
    import ray

    from cpcscale.cluster import session

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        session.connect(4)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 24 utterances of 4 speakers in several flac shards. Read only: copy it to change it."""
    root = tmp_path_factory.mktemp("set")
    pack(str(corpus(root / "audio")), str(root / "shards"), PackConfig(shard_mb=0.12))
    return root / "shards" / "train"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few minutes of the project's speech, packed: train, heldout and unseen. Read only."""
    return speech.pack(tmp_path_factory.getbasetemp() / "speech")


@pytest.fixture
def run_python(s3: ObjectStore) -> Callable[..., tuple[int, list[str]]]:
    """Runs a Python text in a process of its own, `environment` over the store's; returns (status, output lines)."""

    def run(text: str, **environment: str | None) -> tuple[int, list[str]]:
        merged = {**os.environ, **s3.environment, **environment}
        process = subprocess.run(
            [sys.executable, "-c", text],
            env={name: value for name, value in merged.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return process.returncode, (process.stdout + process.stderr).splitlines()

    return run
