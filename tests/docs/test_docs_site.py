"""The site builds without a warning, and its reference says what the code says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from docs_pages import ROOT, reference, reference_pages

from cpcscale import config
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.keys import keys_of


@dataclass(kw_only=True)
class Inner:
    """A group."""

    count: int = 1


@dataclass(kw_only=True)
class Outer:
    """A made config."""

    # Said above,
    # in two lines.
    above: Literal["a", "b"] = "a"
    behind: float = 1e-4  # said behind
    silent: bool = True
    below: str = ""
    """Said below."""
    several: list[int] = field(default_factory=lambda: [1, 2])
    inner: Inner = field(default_factory=lambda: Inner(count=3))
    free: dict[str, Any] = field(default_factory=dict)  # any


def test_a_key_has_its_type_default_and_comment_wherever_it_stands() -> None:
    found = {key.name: (key.kind, key.default, key.comment) for key in keys_of(Outer)}
    assert found == {
        "above": ("`a` or `b`", "a", "Said above, in two lines."),
        "behind": ("float", "0.0001", "said behind"),
        "silent": ("bool", "true", ""),
        "below": ("str", '""', "Said below."),
        "several": ("list[int]", "[1, 2]", ""),
        "inner.count": ("int", "3", ""),
        "free": ("dict[str, Any]", "{}", "any"),
    }


def test_a_key_without_a_comment_is_visible_in_its_table() -> None:
    (row,) = [line for line in reference()._tables(Outer) if "`silent`" in line]
    assert reference().NO_COMMENT in row


def test_every_key_of_every_verb_says_what_it_is() -> None:
    assert reference().undocumented() == []


def test_the_reference_has_every_key_that_a_pretraining_takes() -> None:
    known = set(config.flat(PretrainConfig()))
    assert {key.name for key in keys_of(PretrainConfig)} == known
    page = reference_pages()["reference/pretrain.md"]
    assert all(f"`{key}`" in page for key in known)
    assert dataclasses.is_dataclass(PretrainConfig) and "--take-over" in page


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("properdocs", "mkdocstrings", "material"):
        pytest.importorskip(module, reason="the extra `docs` is not installed")
    build = [sys.executable, "-m", "properdocs", "build", "--strict", "-f", "mkdocs.yml", "-d", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = (tmp_path / "site" / "reference" / "code" / "stream.html").read_text(encoding="utf-8")
    assert "The order of an epoch, as a pure function." in plan
    assert "train.micro_batch" in (tmp_path / "site" / "reference" / "pretrain.html").read_text(encoding="utf-8")
