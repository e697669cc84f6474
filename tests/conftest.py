"""What several tests share: a real S3 server, and trees of audio made on the spot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from cpcscale import audio
from cpcscale.shards.pack import PackConfig, pack

# The machine may be busy with other work: no test fails for being slow, and every run tries the same examples.
settings.register_profile("cpcscale", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("cpcscale")


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server: `base` is a bucket's URL, `environment` is what a process needs to reach it."""

    base: str
    environment: Mapping[str, str]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A SeaweedFS server of this session's own, with one key; this process and its children can reach it."""
    folder = tmp_path_factory.mktemp("weed")
    key = {"accessKey": "test-key", "secretKey": "test-secret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(
        json.dumps({"identities": [{"name": "t", "credentials": [key], "actions": actions}]})
    )
    master, volume, filer, port = (_free_port() for _ in range(4))
    command = [str(Path(sys.executable).parent / "weed"), "-logtostderr=true", "mini", f"-dir={folder}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}"]
    command += [f"-filer.port={filer}", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", "-webdav=false"]
    command += [
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-bucket=speech",
        "-master.telemetry=false",
    ]
    with (folder / "log").open("wb") as log, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            _wait_for(port, server, folder / "log")
            environment = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": key["accessKey"],
                "AWS_SECRET_ACCESS_KEY": key["secretKey"],
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
            for name, value in environment.items():
                patch.setenv(name, value)
            yield ObjectStore("s3://speech", environment)
        finally:
            server.kill()
            server.wait()


def _free_port() -> int:
    """A free port whose number plus 10,000, which the server takes too, is free as well."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            if port > 55_000:
                continue
            try:
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text(errors="replace")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"no S3 server on port {port}:\n{log.read_text(errors='replace')}")


def noise(seconds: float, seed: int = 0, level: int = 3000) -> np.ndarray:
    """int16 noise at 16 kHz that no two seeds share."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(round(seconds * audio.RATE_HZ)) * level).clip(-32768, 32767).astype(np.int16)


def write_tree(root: Path, files: Mapping[str, np.ndarray | bytes], speakers: Mapping[str, str] | None = None) -> Path:
    """`root` with these files (int16 signals as wav or flac by suffix, bytes as they are), a manifest of speakers."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix[1:].lower()
        path.write_bytes(content if isinstance(content, bytes) else audio.encode(content, suffix))
    if speakers is not None:
        rows = [f'"{name}",{speaker},en' for name, speaker in speakers.items()]
        (root / "manifest.csv").write_text("\n".join(["path,speaker,language", *rows]) + "\n", encoding="utf-8")
    return root


def corpus(root: Path, speakers: int = 4, each: int = 6, start: int = 0) -> Path:
    """A tree of `speakers` folders with `each` wav files of .4 to 1.6 s, and their manifest."""
    names = {f"s{n}/{m}.wav": f"s{n}" for n in range(start, start + speakers) for m in range(each)}
    files = {name: noise(0.4 + 1.2 * (i % 7) / 6, seed=1000 * start + i) for i, name in enumerate(names)}
    return write_tree(root, files, names)


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of 24 utterances of 4 speakers in several flac shards. Read only: copy it to change it."""
    root = tmp_path_factory.mktemp("set")
    pack(str(corpus(root / "audio")), str(root / "shards"), PackConfig(shard_mb=0.12))
    return root / "shards" / "train"


@pytest.fixture
def run_python(s3: ObjectStore):
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
