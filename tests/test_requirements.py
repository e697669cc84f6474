"""requirements/ pins all that pyproject.toml asks for and nothing else, since `make setup` has pip resolve nothing."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cpcscale

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("dev", "docs", "bench")
PYTHONS = ("3.11", "3.12", "3.13")


def pins(name: str, python: str) -> dict[str, str]:
    """Name to version of requirements/NAME.txt on that Python."""
    lines = [line for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines() if line[0] != "#"]
    found = [Requirement(line) for line in lines]
    assert all(len(each.specifier) == 1 and str(each.specifier).startswith("==") for each in found)
    here = [each for each in found if each.marker is None or each.marker.evaluate(_on(python))]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in here}


def mistakes(
    wanted: Iterable[str], pinned: Mapping[str, str], below: Mapping[str, str], python: str = "3.11"
) -> list[str]:
    """What is wrong with `pinned`, which `below` is installed before, for the requirements `wanted` and all that the
    installed packages among them require."""
    known = {**below, **pinned}
    found, reached, incomplete = [], set[str](), False
    todo = [(Requirement(text), frozenset({""}), "pyproject.toml") for text in wanted]
    seen = set()
    while todo:
        need, extras, by = todo.pop()
        if need.marker and not any(need.marker.evaluate({**_on(python), "extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(need.name)
        if name not in known:
            # torch's own libraries for a GPU differ from machine to machine: pip resolves them.
            found += [] if by == "torch" and need.marker else [f"{need} of {by} is not pinned"]
            continue
        reached.add(name)
        if not need.specifier.contains(known[name], prereleases=True):
            found.append(f"{by} needs {need}, pinned is {known[name]}")
        if (name, extra_names := frozenset(need.extras)) in seen:
            continue
        seen.add((name, extra_names))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            incomplete = True
            continue
        todo += [(Requirement(text), extra_names | {""}, name) for text in requires]
    # Without the metadata of all packages nobody knows what they require.
    superfluous = set() if incomplete else set(pinned) - reached
    return sorted(found + [f"{name} is pinned, and nothing needs it" for name in superfluous])


def _on(python: str) -> dict[str, str]:
    return {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}


@pytest.mark.parametrize("python", PYTHONS)
def test_core_pins_all_that_the_dependencies_need_and_nothing_else(python: str) -> None:
    # setuptools installs the project itself, without a download.
    wanted = [*PROJECT["dependencies"], "setuptools>=77"]
    assert mistakes(wanted, pins("core", python), {}, python) == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_each_extra_pins_what_it_adds_to_core_and_nothing_else(extra: str, python: str) -> None:
    core, pinned = pins("core", python), pins(extra, python)
    assert not set(core) & set(pinned)
    assert mistakes(PROJECT["optional-dependencies"][extra], pinned, core, python) == []


def test_a_package_of_two_extras_has_one_version() -> None:
    both = [(name, version) for extra in EXTRAS for name, version in pins(extra, "3.13").items()]
    assert len(set(both)) == len({name for name, _ in both})


def test_dev_covers_hf_so_that_its_tests_run() -> None:
    known = {**pins("core", "3.11"), **pins("dev", "3.11")}
    assert mistakes(PROJECT["optional-dependencies"]["hf"], {}, known) == []


@pytest.mark.parametrize("name", ["core", "dev"])
def test_these_tests_run_on_the_pinned_versions(name: str) -> None:
    for package, version in pins(name, default_environment()["python_version"]).items():
        assert Version(metadata.version(package)).public == version, package


def test_a_missing_a_superfluous_and_a_wrong_pin_are_found() -> None:
    core = pins("core", "3.11")
    wanted = [*PROJECT["dependencies"], "setuptools>=77"]
    less = {name: version for name, version in core.items() if name != "botocore"}
    assert any("botocore" in each and "is not pinned" in each for each in mistakes(wanted, less, {}))
    assert mistakes(wanted, core | {"pytest": "9.2.0"}, {}) == ["pytest is pinned, and nothing needs it"]
    assert mistakes(wanted, core | {"mlflow": "3.16.0"}, {})[:1] == [
        "pyproject.toml needs mlflow<3.18,>=3.17, pinned is 3.16.0"
    ]


def test_the_ruff_of_pre_commit_is_the_pinned_one() -> None:
    assert f"rev: v{pins('dev', '3.11')['ruff']}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_version_is_the_same_wherever_it_stands() -> None:
    version = PROJECT["version"]
    assert cpcscale.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} - " in (ROOT / "CHANGELOG.md").read_text()
