"""The cluster launcher's file by Ray's own schema, and the rights that S3 has to give by what cpcscale asks of it."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from documents import INFRA, documents
from object_store import ObjectStore
from ray.autoscaler._private.util import fillout_defaults, validate_config

from cpcscale import storage

AWS = INFRA / "aws"
POLICIES = {path.name: json.loads(path.read_text()) for path in AWS.glob("*.json")}
# What S3 asks for where a request is not called like its right.
_RIGHTS = {
    **{"HeadObject": "GetObject", "ListObjectsV2": "ListBucket", "HeadBucket": "ListBucket"},
    **{"CreateMultipartUpload": "PutObject", "UploadPart": "PutObject", "CompleteMultipartUpload": "PutObject"},
    "ListObjects": "ListBucket",
}
_OF_BUCKETS = {"s3:ListBucket"}


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    (document,) = documents(AWS / "cluster.yaml")
    return document


def _actions(policy: dict[str, Any], effect: str = "Allow") -> list[tuple[str, str]]:
    """(action, resource) of all statements of a policy."""
    pairs = []
    for statement in policy["Statement"]:
        if statement["Effect"] == effect:
            actions, resources = statement["Action"], statement["Resource"]
            for action in [actions] if isinstance(actions, str) else actions:
                pairs += [(action, each) for each in ([resources] if isinstance(resources, str) else resources)]
    return pairs


def test_ray_takes_the_launchers_file(launcher: dict[str, Any]) -> None:
    validate_config(_filled(launcher))
    with pytest.raises(Exception, match="max_worker"):
        validate_config(_filled({**launcher, "max_worker": 2}))


def test_the_head_is_no_spot_node_and_the_gpu_nodes_are(launcher: dict[str, Any]) -> None:
    kinds = launcher["available_node_types"]
    assert kinds[launcher["head_node_type"]]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in kinds["head"]["node_config"]
    assert kinds["gpu-spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert kinds["gpu-spot"]["resources"]["GPU"] and "GPU" not in kinds["feeders"]["resources"]
    assert kinds["feeders"]["resources"]["feeder"]
    most = sum(each.get("max_workers", 0) for each in kinds.values())
    assert most <= launcher["max_workers"]


def test_nodes_ask_for_a_token_and_nobody_but_one_network_reaches_them(launcher: dict[str, Any]) -> None:
    assert "--env=RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert "~/.ray/auth_token" in launcher["file_mounts"]
    for rule in launcher["provider"]["security_group"]["IpPermissions"]:
        assert rule["FromPort"] == rule["ToPort"] == 22
        assert all(each["CidrIp"] != "0.0.0.0/0" for each in rule["IpRanges"])


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_has_the_form_of_one_and_grants_no_more_than_named_actions(name: str) -> None:
    policy = POLICIES[name]
    assert policy["Version"] == "2012-10-17"
    names = [statement["Sid"] for statement in policy["Statement"]]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[A-Za-z0-9]+", each) for each in names)
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
        assert statement["Effect"] in ("Allow", "Deny")
        # Who is named in the policy of a bucket, and nowhere else.
        assert ("Principal" in statement) == (name == "bucket-policy.json")
    for action, resource in _actions(policy):
        assert re.fullmatch(r"[a-z0-9]+:[A-Z][A-Za-z]+", action), f"{action} is more than one action"
        assert resource == "*" or re.fullmatch(r"arn:aws:[a-z0-9]+:[a-z0-9-]*:[0-9]*:\S+", resource)
        if action.startswith("s3:"):
            assert resource.endswith("/*") == (action not in _OF_BUCKETS), f"{action} is not of {resource}"


@pytest.mark.parametrize("name", ["iam-store.json", "bucket-policy.json"])
def test_the_store_is_asked_for_what_the_policy_grants_and_for_all_of_it(
    name: str, s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _requests_of_a_run(f"{s3.base}/policy-{name}", tmp_path, monkeypatch)
    needed = {f"s3:{_RIGHTS.get(request, request)}" for request in asked}
    granted = {action for action, _ in _actions(POLICIES[name])}
    assert needed <= granted
    # An upload in parts that fails is given up; none fails here.
    assert granted - needed == {"s3:AbortMultipartUpload"}


def test_a_connection_without_tls_is_refused_to_all() -> None:
    (denied,) = [each for each in POLICIES["bucket-policy.json"]["Statement"] if each["Effect"] == "Deny"]
    assert denied["Principal"] == "*" and denied["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert len(denied["Resource"]) == 2


@pytest.mark.parametrize("spot", [True, False])
def test_a_node_with_a_notice_is_drained_and_one_without_waits(spot: bool, tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/drained\n')
    ray.chmod(0o755)
    with _metadata(tmp_path, noticed_after=2 if spot else None) as (url, asked):
        path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        watcher = subprocess.Popen(
            ["sh", AWS / "spot-notice.sh", "head:6379"],
            env={**os.environ, "PATH": path, "METADATA_URL": url, "POLL_S": "0.1"},
        )
        if spot:
            assert watcher.wait(60) == 0
            drained = (tmp_path / "drained").read_text()
            assert "drain-node --address=head:6379 --reason=DRAIN_NODE_REASON_PREEMPTION" in drained
        else:
            while len(asked) < 3:
                assert watcher.poll() is None
            watcher.kill()
            watcher.wait()
            assert not (tmp_path / "drained").exists()


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    # Only a launch that was prepared has this one.
    return {**fillout_defaults(config), "cluster_synced_files": []}


def _requests_of_a_run(base: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the store is asked for by all that storage.py can do, large files among it."""
    from aiobotocore.client import AioBaseClient

    asked: set[str] = set()
    real = AioBaseClient._make_api_call

    async def recorded(client: Any, operation: str, parameters: Any) -> Any:
        asked.add(operation)
        return await real(client, operation, parameters)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", recorded)
    storage.write(f"{base}/small", b"x")
    storage.write(f"{base}/large", bytes(20 * 2**20))
    assert storage.create(f"{base}/marker", b"x")
    assert not storage.create(f"{base}/marker", b"y")
    with storage.publishing(f"{base}/published") as aside:
        aside.write_bytes(bytes(20 * 2**20))
    assert storage.read(f"{base}/small", 0, 1) == b"x"
    assert storage.size(f"{base}/large") == sum(map(len, storage.chunks(f"{base}/large")))
    assert storage.exists(base) and not storage.exists(f"{base}/nothing")
    assert storage.exists(base.rpartition("/")[0]), "the bucket itself"
    assert len(storage.list_files(base)) == 4
    with pytest.raises(storage.NotFoundError):
        storage.list_files(f"{base}/nothing")
    storage.remove(base)
    assert not storage.exists(f"{base}/small")
    return asked


class _metadata:
    """Amazon's metadata service as far as a notice needs it, on loopback: one after so many questions, or never."""

    def __init__(self, folder: Path, noticed_after: int | None) -> None:
        self._after = noticed_after
        self._asked: list[str] = []

    def __enter__(self) -> tuple[str, list[str]]:
        asked, after = self._asked, self._after

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self._answer(200 if self.path == "/latest/api/token" else 404, b"a-token")

            def do_GET(self) -> None:
                if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                    return self._answer(401, b"")
                asked.append(self.path)
                there = self.path == "/latest/meta-data/spot/instance-action" and after and len(asked) > after
                return self._answer(200 if there else 404, b"{}")

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}", asked

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
