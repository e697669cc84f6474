"""Fixtures that tests of several rooms share: a real S3 server, a process with access to it, a packed shard set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import object_store
import pytest
from hypothesis import settings
from object_store import ObjectStore
from trees import corpus

from cpcscale.shards.pack import PackConfig, pack

# The machine may be busy with other work: no test fails for being slow, and every run tries the same examples.
settings.register_profile("cpcscale", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("cpcscale")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running S3 server; this process and those it starts can reach it."""
    with object_store.running(tmp_path_factory.mktemp("weed")) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 24 utterances of 4 speakers in several flac shards. Read only: copy it to change it."""
    root = tmp_path_factory.mktemp("set")
    pack(str(corpus(root / "audio")), str(root / "shards"), PackConfig(shard_mb=0.12))
    return root / "shards" / "train"


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
