"""miniCPC for real: packed, pretrained and loaded from the files it is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import speech
import torch

from cpcscale import audio
from cpcscale.emotion.corpora.corpus import Corpus, Utterance
from cpcscale.emotion.encoders.networks import pretrain_on, pretrain_on_rows
from cpcscale.emotion.recipe import EmotionRecipe
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


def test_parts_of_a_file_are_pretrained_on_as_if_each_were_a_file(tmp_path):
    """So nothing of a file is heard but the parts of the training speakers."""
    files = sorted((speech.AUDIO / "asterisk_en").glob("*.opus"))[:12]
    waves = [audio.to_int16(audio.decode(str(file))) for file in files]
    ends = np.cumsum([len(wave) for wave in waves]) / audio.RATE_HZ
    (tmp_path / "long.wav").write_bytes(audio.encode(np.concatenate(waves), "wav"))
    cut, parts = [], []
    for at, (wave, end) in enumerate(zip(waves, ends.tolist(), strict=True)):
        path = tmp_path / f"{at}.wav"
        path.write_bytes(audio.encode(wave, "wav"))
        cut.append(Utterance(f"u{at}", str(path), "s", (3.0, 3.0, 3.0)))
        segment = (end - len(wave) / audio.RATE_HZ, end)
        parts.append(Utterance(f"u{at}", str(tmp_path / "long.wav"), "s", (3.0, 3.0, 3.0), segment=segment))
    recipe = EmotionRecipe(system="minicpc", pretraining=speech.recipe(train__steps=3, train__batch=8, train__lanes=4))
    weights = []
    for rows in (cut, parts):
        made = pretrain_on_rows(recipe, Corpus("made", (), (1.0, 5.0), tuple(rows)), None, range(10))
        weights.append(torch.cat([parameter.flatten() for parameter in made.parameters()]))
    assert torch.equal(*weights)
