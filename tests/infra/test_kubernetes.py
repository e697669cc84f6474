"""Manifests of infra/kuberay against the schemas of Kubernetes and of KubeRay, and what they promise each other."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from documents import INFRA, documents

from cpcscale.cluster.pretrain_config import PretrainConfig

# The oldest and the newest Kubernetes that is in support.
KUBERNETES = ("1.33", "1.36")
SCHEMAS = Path(__file__).parent / "schemas"
MANIFESTS = [
    pytest.param(document, id=f"{path.name}-{document['kind']}-{document['metadata']['name']}")
    for path in sorted((INFRA / "kuberay").glob("*.yaml"))
    for document in documents(path)
]
RAY = [each for each in MANIFESTS if each.values[0]["apiVersion"].startswith("ray.io/")]
CORE = [each for each in MANIFESTS if each not in RAY]
_PART = {"app.kubernetes.io/part-of": "cpcscale"}


def _closed(schema: Any) -> Any:
    """The schema without the freedom of unknown keys, which the API server refuses in strict mode too."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    free = "additionalProperties" in closed or closed.get("x-kubernetes-preserve-unknown-fields")
    if closed.get("type") == "object" and isinstance(closed.get("properties"), dict) and not free:
        closed["additionalProperties"] = False
    return closed


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of the resource's own schema. A RayJob holds the spec of a RayCluster."""
    cluster = json.loads((SCHEMAS / "raycluster.json").read_text())
    schema = cluster
    if kind == "RayJob":
        schema = json.loads((SCHEMAS / "rayjob.json").read_text())
        schema["properties"]["spec"]["properties"]["rayClusterSpec"] = cluster["properties"]["spec"]
    # What every resource has, the schema of a custom one leaves to Kubernetes.
    names = {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": {"type": "object"}}
    schema["properties"]["metadata"] = {"type": "object", "properties": names, "required": ["name", "namespace"]}
    return jsonschema.Draft202012Validator(_closed(schema))


def _cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def _pods(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod template) of all pods of a manifest."""
    if document["kind"] == "CronJob":
        yield "submit", document["spec"]["jobTemplate"]["spec"]["template"]
    if document["apiVersion"].startswith("ray.io/"):
        yield "head", _cluster(document)["headGroupSpec"]["template"]
        for group in _cluster(document)["workerGroupSpecs"]:
            yield group["groupName"], group["template"]
    if submitter := document.get("spec", {}).get("submitterPodTemplate"):
        yield "submitter", submitter


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("document", CORE)
def test_every_manifest_of_kubernetes_itself_is_valid(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("document", RAY)
def test_every_manifest_of_kuberay_is_valid(document: dict[str, Any]) -> None:
    _validator(document["kind"]).validate(document)


@pytest.mark.parametrize("document", RAY)
def test_a_key_that_kuberay_has_not_is_found(document: dict[str, Any]) -> None:
    wrong = copy.deepcopy(document)
    _cluster(wrong)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(jsonschema.ValidationError, match="enviroment"):
        _validator(wrong["kind"]).validate(wrong)


@pytest.mark.parametrize("document", MANIFESTS)
def test_every_container_has_requests_and_limits_and_no_more_rights_than_it_needs(document: dict[str, Any]) -> None:
    for name, pod in _pods(document):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, name
        for container in pod["spec"]["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]) & set(resources["limits"]), name
            # Memory that is promised twice gets pods killed in mid-training.
            assert name.startswith("submit") or resources["requests"]["memory"] == resources["limits"]["memory"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert not container["image"].endswith(":latest") and ":" in container["image"], name


@pytest.mark.parametrize("document", MANIFESTS)
def test_secrets_are_named_and_never_written(document: dict[str, Any]) -> None:
    assert document["kind"] != "Secret"
    for _, pod in _pods(document):
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                secret = re.search(r"TOKEN|SECRET|PASSWORD|ACCESS_KEY", variable["name"])
                assert not secret or "secretKeyRef" in variable["valueFrom"], variable["name"]


def test_network_policy_and_budgets_hold_for_every_pod_of_the_project() -> None:
    for document in (each.values[0] for each in MANIFESTS):
        for name, pod in _pods(document):
            labels = pod["metadata"]["labels"]
            assert labels["app.kubernetes.io/part-of"] == "cpcscale", name
            component = {"head": "head", "submit": "submitter", "submitter": "submitter"}.get(name, "worker")
            assert labels["app.kubernetes.io/component"] == component, name
    policies = [each for path in ("network", "disruption") for each in documents(INFRA / "kuberay" / f"{path}.yaml")]
    selected = [(policy["spec"].get("podSelector") or policy["spec"]["selector"])["matchLabels"] for policy in policies]
    assert selected[0] == _PART
    assert {each.get("app.kubernetes.io/component") for each in selected[1:]} == {"head", "worker"}
    assert all(_PART.items() <= each.items() for each in selected)


@pytest.mark.parametrize("document", RAY)
def test_every_volume_is_mounted_and_its_storage_class_is_there(document: dict[str, Any]) -> None:
    classes = {each["metadata"]["name"] for each in documents(INFRA / "kuberay" / "storage.yaml")}
    for name, pod in _pods(document):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        mounted = {mount["name"] for each in pod["spec"]["containers"] for mount in each.get("volumeMounts", [])}
        assert mounted == set(volumes), name
        for volume in volumes.values():
            if claim := volume.get("ephemeral"):
                assert claim["volumeClaimTemplate"]["spec"]["storageClassName"] in classes


@pytest.mark.parametrize("document", RAY)
def test_every_cluster_asks_for_a_token_and_scales_within_its_bounds(document: dict[str, Any]) -> None:
    cluster = _cluster(document)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "cpcscale-ray"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "a worker beside the driver goes with it"
    for group in cluster["workerGroupSpecs"]:
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_a_node_that_is_taken_away_has_time_for_its_checkpoint() -> None:
    (job,) = documents(INFRA / "kuberay" / "pretrain.yaml")
    pods = dict(_pods(job))
    settings = documents(INFRA / "kuberay" / "base.yaml")[1]["data"]
    grace_s = PretrainConfig().stop_grace_s
    assert pods["head"]["spec"]["terminationGracePeriodSeconds"] > grace_s
    assert float(settings["RAY_JOB_STOP_WAIT_TIME_S"]) > grace_s
    (container,) = pods["gpu-spot"]["spec"]["containers"]
    notice = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    deadline_s = int(re.search(r"--deadline-remaining-seconds=(\d+)", notice)[1])
    stays_s = int(re.search(r"sleep (\d+)", notice)[1])
    # The pod outlives the deadline that Ray was told of, and the grace of Kubernetes outlives both.
    assert deadline_s < stays_s < pods["gpu-spot"]["spec"]["terminationGracePeriodSeconds"] - 15
    assert pods["gpu-spot"]["spec"]["terminationGracePeriodSeconds"] < 120, "a spot node is gone after two minutes"
