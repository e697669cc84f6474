"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Modules whose main functions must have an example.
NEEDED = {
    "cpcscale",
    "cpcscale.audio.encoding",
    "cpcscale.config",
    "cpcscale.emotion.scores.ccc",
    "cpcscale.experiments.fit",
    "cpcscale.objective.infonce",
    "cpcscale.objective.negatives",
    "cpcscale.serve.encoder",
    "cpcscale.serve.recogniser",
    "cpcscale.shards.packing.sources",
    "cpcscale.stream.epoch_order",
    "cpcscale.stream.lanes",
    "cpcscale.stream.window",
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


WITH_EXAMPLES = sorted(
    module(path) for path in ROOT.glob("cpcscale/**/*.py") if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module_give_what_they_say(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_what_matters_most_has_an_example() -> None:
    assert not NEEDED - {*WITH_EXAMPLES}
