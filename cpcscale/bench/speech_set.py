"""Makes the shard set of a bench: utterances of one length from real speech, so that no crop needs padding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.packing.sources import find_audio


def make_speech_set(
    speech: str,
    folder: Path,
    *,
    codec: Literal["flac", "wav", "opus"],
    hours: float,
    utterance_s: float,
    shard_mb: float,
) -> Index:
    """Packs about `hours` of utterances of `utterance_s` seconds, cut from the joined audio below `speech`, repeated as
    needed. Returns the index."""
    length = round(utterance_s * audio.RATE_HZ)
    wanted = max(1, round(hours * 3600 / utterance_s))
    (folder / "audio").mkdir(parents=True)
    for number, wave in zip(range(wanted), _utterances(speech, length), strict=False):
        (folder / "audio" / f"{number:06d}.wav").write_bytes(audio.encode(wave, "wav"))
    packed = pack(str(folder / "audio"), str(folder / "shards"), PackConfig(codec=codec, shard_mb=shard_mb, max_s=0))
    return packed.splits["train"]


def _utterances(speech: str, length: int) -> Iterator[np.ndarray]:
    """Yields int16 [length] without end: the files are joined and cut, from other samples on in each round."""
    sources = find_audio(speech)
    skip = 0
    while True:
        left = np.zeros(0, np.int16)
        for source in sources:
            local = storage.local_path(source.path)
            wave = audio.to_int16(audio.decode(str(local) if local else storage.read(source.path)))
            left = np.concatenate([left, wave[skip:]])
            while len(left) >= length:
                yield left[:length]
                left = left[length:]
        skip += 997
        if skip > length:
            raise UserError(f"there is too little speech below {speech} for a bench: lower hours, or name more audio")
