"""Fixtures of recognisers: a tiny labelled corpus and a pretraining that stopped at its first step."""

from pathlib import Path

import pytest
from made_voices import put_checkpoint, put_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_corpus(tmp_path_factory.mktemp("corpus") / "tones")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return put_checkpoint(tmp_path_factory.mktemp("run"))
