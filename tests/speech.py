"""A few minutes of the project's speech as shard sets, packed once a session, and small recipes for it."""

from __future__ import annotations

import csv
import functools
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpcscale import config
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack_sources
from cpcscale.shards.packing.sources import AudioFile
from cpcscale.shards.rows import scan
from cpcscale.train.recipe import Recipe
from cpcscale.train.setup import Data

AUDIO = Path(__file__).parent / "data" / "speech"
UNSEEN_VOICE = "asterisk_it"
# 16 channels see a second of speech in a millisecond or two; the paper's hop of 160 samples is kept.
TINY = (
    "window.kind=tile",
    "window.seconds=0.64",
    "model.encoder.channels=16",
    "model.context.width=16",
    "model.predictor.steps=4",
    "objective.negatives=8",
    "train.batch=16",
    "train.lanes=8",
    "train.threads=1",
    "train.log_every_steps=1",
)


@functools.cache
def pack(folder: Path, every: int = 13) -> Path:
    """`folder` with the sets train (4 shards of 5 voices), heldout and unseen, of every 13th file: about 5 minutes."""
    with (AUDIO / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::every]
    sources = [AudioFile(str(AUDIO / row["path"]), row["path"], row["speaker"], row["language"]) for row in rows]
    spec = PackConfig(shard_mb=1.5, heldout_share=0.1, heldout_by="utterance", unseen_groups=[UNSEEN_VOICE])
    pack_sources(sources, str(folder), spec)
    return folder


def data(shards: Path, *, validate: bool = False) -> Data:
    """The packed sets as the loop takes them."""
    names = ("heldout", "unseen") if validate else ()
    return Data(Index.load(str(shards / "train")), {name: Index.load(str(shards / name)) for name in names})


def recipe(**overrides: Any) -> Recipe:
    """The tiny recipe with these keys changed; a double underscore stands for a dot."""
    changes = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return config.load(Recipe, None, [*TINY, *changes])


class Killed(BaseException):
    """Ends a run in mid-air, past every handler."""


class Watcher:
    """An observer that keeps what it hears, and can end the run in a step, before its checkpoint is made."""

    def __init__(self, stop_at: int = 0) -> None:
        self.losses: dict[int, float] = {}
        self.replays: dict[int, float] = {}
        self.notes: list[str] = []
        self.saves = 0
        self.bad: list[Mapping[str, Any]] = []
        self._stop_at = stop_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, step: int, total: int) -> None:
        if step == self._stop_at:
            raise Killed

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.losses[step] = values["loss"]

    def saved(self) -> None:
        self.saves += 1

    def replayed(self, step: int, values: Mapping[str, float]) -> None:
        if "loss" in values:
            self.replays[step] = values["loss"]

    def quarantined(self, windows: Sequence[Mapping[str, Any]]) -> None:
        self.bad = list(windows)


def ids(path: Path) -> dict[int, list[str]]:
    """The window ids of each step; fails when a step stands twice or out of order."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return {line["step"]: line["ids"] for line in lines}


def spoil(shards: Path, folder: Path, utterances: Sequence[int]) -> Index:
    """A copy of the train set whose members of these numbers match their checksum but are not audio."""
    index = Index.load(str(shards / "train"))
    keys = {index.utterances["key"][number].as_py() for number in utterances}
    folder.mkdir(parents=True)
    entries = []
    for name in index.shards["path"].to_pylist():
        with tarfile.open(shards / "train" / name) as old, tarfile.open(folder / name, "w") as new:
            for member in old:
                data = old.extractfile(member).read()  # type: ignore[union-attr]
                key, _, suffix = member.name.rpartition(".")
                if key in keys and suffix != "json":
                    data = b"not audio"
                    member.size = len(data)
                new.addfile(member, io.BytesIO(data))
        entries.append(scan(folder / name, name))
    return Index.of(str(folder), entries)
