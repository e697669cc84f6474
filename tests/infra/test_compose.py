"""The compose file: by the Compose Specification, filled from the example of its settings, and its own sense."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from documents import INFRA, ROOT, leaves

from cpcscale import storage
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.storage import StorageConfig

FOLDER = INFRA / "compose"
TEXT = (FOLDER / "compose.yaml").read_text()
_VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(?:(:?[-?])([^}]*))?\}")


def _settings() -> dict[str, str]:
    lines = (FOLDER / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as compose sees it with the example's settings."""
    settings = _settings()
    return yaml.safe_load(_VARIABLE.sub(lambda found: settings[found[1]], TEXT))


def test_the_file_is_what_the_compose_specification_allows(compose: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(compose)
    compose["services"]["head"]["helthcheck"] = {}
    assert not validator.is_valid(compose)
    del compose["services"]["head"]["helthcheck"]


def test_every_variable_stands_in_the_example_and_every_one_there_is_used() -> None:
    assert {found[1] for found in _VARIABLE.finditer(TEXT)} == set(_settings())


def test_a_secret_that_is_not_given_stops_compose_and_none_is_written_into_the_file() -> None:
    secrets = [name for name in _settings() if re.search(r"TOKEN|PASSWORD|ACCESS_KEY", name)]
    assert len(secrets) == 4
    for name in secrets:
        assert f"${{{name}:?" in TEXT
        assert "change" in _settings()[name], "the example has no real secret"
    assert ".env\n" in (FOLDER / ".gitignore").read_text()


def test_services_wait_for_the_health_of_what_they_need(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_healthy"
            assert needed in compose["services"]
    assert set(compose["services"]["worker-1"]["depends_on"]) == {"head"}
    assert set(compose["services"]["head"]["depends_on"]) == {"store", "mlflow"}


def test_named_volumes_networks_and_configs_exist_and_each_is_used(compose: dict[str, Any]) -> None:
    services = compose["services"].values()
    volumes = {each.partition(":")[0] for service in services for each in service.get("volumes", [])}
    assert volumes == set(compose["volumes"])
    assert {each for service in services for each in service["networks"]} == set(compose["networks"])
    assert {each["source"] for service in services for each in service.get("configs", [])} == set(compose["configs"])
    built = {service["build"]["dockerfile"] for service in services if "build" in service}
    assert all((ROOT / each).is_file() for each in built)
    assert {(FOLDER / service["build"]["context"]).resolve() for service in services if "build" in service} == {ROOT}


def test_ports_are_those_of_loopback_until_told_otherwise(compose: dict[str, Any]) -> None:
    ports = [each for service in compose["services"].values() for each in service.get("ports", [])]
    assert len(ports) == 3
    assert all(each.startswith("127.0.0.1:") for each in ports)
    assert "ports" not in compose["services"]["database"]


def test_images_that_are_fetched_have_a_version(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if "build" not in service:
            assert re.search(r":\d+\.\d+", service["image"]), name


def test_a_job_that_is_stopped_has_time_for_its_checkpoint(compose: dict[str, Any]) -> None:
    grace_s = PretrainConfig().stop_grace_s
    for name in ("head", "worker-1", "worker-2"):
        service = compose["services"][name]
        assert float(service["stop_grace_period"].removesuffix("s")) > grace_s
        assert float(service["environment"]["RAY_JOB_STOP_WAIT_TIME_S"]) > grace_s
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert len(service["environment"]["RAY_AUTH_TOKEN"]) >= 32


def test_the_store_starts_by_its_own_command_with_its_bucket_and_refuses_other_keys(
    compose: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = compose["services"]["store"]
    keys = tmp_path / "s3.json"
    keys.write_text(compose["configs"]["store-keys"]["content"])
    ports = _free_ports(4)
    # The same words, on this machine's ports and folders.
    changed = {"-dir": str(tmp_path), "-ip": "127.0.0.1", "-ip.bind": "127.0.0.1", "-s3.port": str(ports[0])}
    changed["-s3.config"] = str(keys)
    words = [
        f"{word.partition('=')[0]}={changed.get(word.partition('=')[0], word.partition('=')[2])}"
        if "=" in word
        else word
        for word in store["command"].split()
    ]
    words += [f"-{part}.port={port}" for part, port in zip(("master", "volume", "filer"), ports[1:], strict=True)]
    server = subprocess.Popen(
        [str(Path(sys.executable).parent / "weed"), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        environment = compose["services"]["head"]["environment"]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, environment[name])
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{ports[0]}")
        storage.configure(StorageConfig(total_timeout_s=60))
        bucket = f"s3://{_settings()['BUCKET']}"
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", ports[0])) == 0 and storage.exists(bucket):
                    break
            time.sleep(0.2)
        storage.write(f"{bucket}/a", b"x")
        assert storage.read(f"{bucket}/a") == b"x"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        storage.configure(StorageConfig(total_timeout_s=5))
        with pytest.raises(Exception, match="denied"):
            storage.read(f"{bucket}/a")
    finally:
        storage.configure(StorageConfig())
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def test_no_service_reads_what_the_file_does_not_say(compose: dict[str, Any]) -> None:
    # A `$` that compose did not fill would reach the container as it is.
    assert not [text for text in leaves(compose["services"]) if "${" in text]


def _free_ports(count: int) -> list[int]:
    # SeaweedFS takes each port + 10000 too.
    found: list[int] = []
    for port in range(20000 + time.monotonic_ns() % 20000, 50000):
        with socket.socket() as one, socket.socket() as other:
            if all(each.connect_ex(("127.0.0.1", p)) for each, p in ((one, port), (other, port + 10000))):
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")
