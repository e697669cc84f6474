from pathlib import Path

import pytest
import speech


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few minutes of the project's speech, packed: train, heldout and unseen."""
    return speech.pack(tmp_path_factory.getbasetemp() / "speech")
