"""miniCPC for real: packed, pretrained and loaded from the files it is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import speech
import torch

from cpcscale.emotion.encoders.networks import pretrain_on
from cpcscale.shards.packing.sources import AudioFile, find_audio


def _weights(folder: Path, work: Path) -> torch.Tensor:
    recipe = speech.recipe(train__steps=3, train__batch=8, train__lanes=4)
    sources = [
        AudioFile(path=found.path, name=found.name, group="one", language="") for found in find_audio(str(folder))
    ]
    return torch.cat([parameter.flatten() for parameter in pretrain_on(sources, recipe, str(work)).parameters()])


def test_the_network_depends_on_the_files_and_not_on_where_they_lie(tmp_path):
    here, there, fewer = (tmp_path / name for name in ("here", "far/away", "fewer"))
    files = sorted((speech.AUDIO / "asterisk_en").glob("*.opus"))[:12]
    for folder, chosen in ((here, files), (there, files), (fewer, files[:-1])):
        folder.mkdir(parents=True)
        for file in chosen:
            shutil.copy(file, folder)
    first = _weights(here, tmp_path / "work1")
    assert torch.equal(first, _weights(there, tmp_path / "work2"))
    assert not torch.equal(first, _weights(fewer, tmp_path / "work3"))
