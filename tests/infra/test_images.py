"""The Dockerfile and the scripts, by their linters, and what a build takes from the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documents import INFRA, ROOT, documents, leaves

TOOLS = Path(sys.executable).parent
DOCKERFILE = (INFRA / "Dockerfile").read_text()
SCRIPTS = [*INFRA.glob("**/*.sh"), *INFRA.glob("**/*.sbatch")]
_INSTRUCTIONS = DOCKERFILE.replace("\\\n", " ").splitlines()
_STAGES = [found for line in _INSTRUCTIONS if (found := re.match(r"FROM (\S+) AS (\S+)", line))]


def _pins() -> set[str]:
    lines = (ROOT / "requirements" / "core.txt").read_text().splitlines()
    return {line.partition("==")[0].lower() for line in lines if "==" in line}


def _ignored() -> list[str]:
    return [line for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")]


def _copied() -> list[str]:
    """What the Dockerfile copies from the checkout."""
    lines = [line.split()[1:-1] for line in _INSTRUCTIONS if line.startswith("COPY ") and "--from" not in line]
    return [source for sources in lines for source in sources]


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([TOOLS / "hadolint", INFRA / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    command = [TOOLS / "shellcheck", "--severity=warning", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_shell_in_the_dockerfile_and_in_the_manifests_is_found_by_these_tests() -> None:
    assert {script.name for script in SCRIPTS} == {"cpcscale.sbatch", "spot-notice.sh"}


def test_every_target_that_runs_has_no_rights_and_there_are_three() -> None:
    parents = {found[2]: found[1] for found in _STAGES}
    targets = {"cpu", "cuda", "mlflow"}
    assert targets <= set(parents)
    for target in targets:
        stage = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert re.findall(r"^USER (\S+)$", stage, re.M) == ["1000:1000"], target
        assert parents[target] not in parents or "runtime" in (parents[target], parents[parents[target]])


def test_whatever_pip_installs_is_pinned() -> None:
    installs = [line for line in DOCKERFILE.replace("\\\n", " ").split("\n") for _ in re.findall(r"pip install", line)]
    for line in installs:
        for command in re.findall(r"pip install ([^&]*)", line):
            exact = all("==" in word for word in command.split())
            wheel = command.startswith("--no-deps /wheels/")
            pinned = re.search(r"--(constraint|no-deps --requirement) requirements/core\.txt", command)
            assert pinned or exact or wheel, command
    server = [line for line in (INFRA / "mlflow-requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line or line.lower() in _pins() for line in server)


def test_the_build_gets_all_that_it_copies_and_nothing_else() -> None:
    taken = [line[1:] for line in _ignored() if line.startswith("!")]
    assert _ignored()[0] == "*"
    assert sorted(set(_copied())) == sorted(taken)
    assert all((ROOT / each).exists() for each in taken)


def test_base_images_have_a_version() -> None:
    default = re.search(r"^ARG PYTHON_IMAGE=python:(3\.11\.\d+)-slim-\w+$", DOCKERFILE, re.M)
    assert default, "the Python that requirements/ was tested with"
    known = {found[2] for found in _STAGES}
    assert {found[1] for found in _STAGES} - known == {"${PYTHON_IMAGE}"}


def test_manifests_run_images_that_the_dockerfile_makes() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    places = [*(INFRA / "kuberay").glob("*.yaml"), INFRA / "aws" / "cluster.yaml"]
    texts = [text for path in places for document in documents(path) for text in leaves(document)]
    images = [text for text in texts if re.match(r"[a-z0-9.-]+/cpcscale:", text)]
    assert len(images) > 8
    assert all(re.search(rf":{re.escape(version)}-(cpu|cuda)$", image) for image in images)
