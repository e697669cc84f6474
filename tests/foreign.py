"""Tars as others make them: by the `tar` program, by webdataset's writer, in the layout of a lhotse shar."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset
from trees import noise

from cpcscale import audio
from cpcscale.shards.index import Index
from cpcscale.shards.reader import ShardReader

FORMS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_24"),
    "au": ("AU", "PCM_16"),
}


def sound(suffix: str, seconds: float, rate_hz: int = 16_000, channels: int = 1, seed: int = 0) -> bytes:
    """A file of noise; `seconds` of it at its own rate."""
    frames = round(seconds * rate_hz)
    wave = np.random.default_rng(seed).standard_normal((frames, channels)).astype(np.float32) * 0.1
    out = io.BytesIO()
    form, subtype = FORMS[suffix]
    soundfile.write(out, wave, rate_hz, format=form, subtype=subtype)
    return out.getvalue()


def flac(seconds: float = 0.5, seed: int = 0) -> bytes:
    return audio.encode(noise(seconds, seed), "flac")


def by_tar(path: Path, tree: Path, *options: str, what: str = ".") -> Path:
    """The tar that the `tar` program makes of a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-cf", str(path), *options, "-C", str(tree), what], check=True)
    return path


def by_hand(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    """A tar of these names, which may be any, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def by_webdataset(path: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """The tar that webdataset's own writer makes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(dict(sample))
    return path


def shar(folder: Path, number: int, cuts: Sequence[tuple[str, bytes, Sequence[tuple[str, str]]]]) -> None:
    """The files that lhotse writes for one shard of recordings, by hand, since lhotse is no part of this project.

    A cut is (id, flac bytes, (speaker, language) of each supervision).
    """
    members, lines = [], []
    for name, data, said in cuts:
        samples = audio.read_header(data).samples
        recording = {"id": f"rec-{name}", "sampling_rate": 16_000, "num_samples": samples, "duration": samples / 16_000}
        recording["sources"] = [{"type": "shar", "channels": [0], "source": ""}]
        members += [(f"{name}.flac", data), (f"{name}.json", json.dumps(recording).encode())]
        common = {"recording_id": f"rec-{name}", "start": 0.0, "duration": samples / 16_000, "channel": 0}
        supervisions = [
            {"id": f"{name}-{n}", **common, "text": "…", "speaker": speaker, "language": language}
            for n, (speaker, language) in enumerate(said)
        ]
        cut = {"id": name, "start": 0.0, "duration": samples / 16_000, "channel": 0, "supervisions": supervisions}
        lines.append(json.dumps({**cut, "recording": recording, "type": "MonoCut"}))
    by_hand(folder / f"recording.{number:06d}.tar", members)
    with gzip.open(folder / f"cuts.{number:06d}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def read_back(index: Index) -> dict[str, bytes]:
    """The bytes of every member that the index has, read as training reads them, by shard and key.

    Fails when a member's length is not what the index says, or its last second cannot be had as a slice.
    """
    reader, got = ShardReader(index), {}
    for shard in range(index.shards.num_rows):
        rows = reader.rows(shard)
        for number, key in enumerate(rows.table["key"].to_pylist()):
            data = reader.member(rows, number)
            samples = int(rows.samples[number])
            assert len(audio.decode(data)) == samples, key
            last = min(samples, audio.RATE_HZ)
            assert audio.decode_slice(data, samples - last, last).any(), key
            got[f"{index.shards['path'][shard].as_py()}:{key}"] = data
    reader.close()
    return got
