"""Trees of made audio, small enough to pack in a blink, and ways to look at what a pack made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cpcscale import audio, storage
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackedSets


def noise(seconds: float, seed: int = 0, level: int = 3000) -> np.ndarray:
    """int16 noise at 16 kHz that no two seeds share."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(round(seconds * audio.RATE_HZ)) * level).clip(-32768, 32767).astype(np.int16)


def write_tree(root: Path, files: Mapping[str, np.ndarray | bytes], speakers: Mapping[str, str] | None = None) -> Path:
    """`root` with these files (int16 signals as wav or flac by suffix, bytes as they are), a manifest of speakers."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix[1:].lower()
        path.write_bytes(content if isinstance(content, bytes) else audio.encode(content, suffix))
    if speakers is not None:
        rows = [f'"{name}",{speaker},en' for name, speaker in speakers.items()]
        (root / "manifest.csv").write_text("\n".join(["path,speaker,language", *rows]) + "\n", encoding="utf-8")
    return root


def corpus(root: Path, speakers: int = 4, each: int = 6, start: int = 0) -> Path:
    """A tree of `speakers` folders with `each` wav files of .4 to 1.6 s, and their manifest."""
    names = {f"s{n}/{m}.wav": f"s{n}" for n in range(start, start + speakers) for m in range(each)}
    files = {name: noise(0.4 + 1.2 * (i % 7) / 6, seed=1000 * start + i) for i, name in enumerate(names)}
    return write_tree(root, files, names)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by a digest of its bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def promised(target: Path | str) -> dict[str, str]:
    """What the same pack gives everywhere: the bytes of each file but an index's own, and what each index names."""
    files = storage.list_files(str(target))
    indexes = [name for name in files if name.endswith("/index.json")]
    ours = [name for name in files if name.endswith(".tar") or "/" not in name]
    got = {name: hashlib.sha256(storage.read(storage.join(str(target), name))).hexdigest() for name in ours}
    for name in indexes:
        index = Index.load(storage.join(str(target), name.rpartition("/")[0]))
        got[name] = f"{index.fingerprint} {hashlib.sha256(str(index.utterances.to_pylist()).encode()).hexdigest()}"
    return got


def hidden(folder: Path) -> list[str]:
    """The files and folders below `folder` that no listing shows: locks, notes, files being written."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def members(packed: PackedSets) -> dict[str, str]:
    """The split of every packed utterance, by key."""
    return {key: split for split, index in packed.splits.items() for key in index.utterances["key"].to_pylist()}


def backwards(function: Callable[[Any], Any], items: Sequence[Any], **_: Any) -> list[Any]:
    return [function(item) for item in reversed(items)][::-1]


def threads(function: Callable[[Any], Any], items: Sequence[Any], **_: Any) -> list[Any]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, items))
