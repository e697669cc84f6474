"""How recordings are cut into pieces, and the tasks of pass 2. Pure: depends only on the lengths of files.

A recording of S samples is cut into the smallest number n of pieces of at most M samples; piece i is samples
[iS/n, (i+1)S/n), so lengths differ by at most one. A task packs a group of files into one or more shards. If any file
of the group is cut, its pieces are shuffled over its shards; a group of whole files is one shard, in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from cpcscale.audio import SoundLimits
from cpcscale.shards.packing.sources import AudioFile


@dataclass(frozen=True)
class PackedFile:
    """One file of a task: its key, its length at 16 kHz by its header, and the number of pieces it is cut into."""

    key: str
    source: AudioFile
    samples: int
    pieces: int

    def piece_key(self, piece: int) -> str:
        """The key of the utterance that a piece becomes: that of the file if it is not cut."""
        return self.key if self.pieces == 1 else f"{self.key}/{piece:05d}"

    def start(self, piece: int) -> int:
        """The first sample of a piece; for the number after the last piece, the end of the file."""
        return piece * self.samples // self.pieces


@dataclass(frozen=True)
class PackTask:
    """A group of files and the shards that they fill, from `first_shard` on; it can run in any process.

    `note` is the file in which the task notes what it made. If `resumed`, it may have run in an earlier start.
    """

    target: str
    note: str
    first_shard: int
    shards: int
    codec: str
    min_samples: int
    seed: int
    resumed: bool
    members: tuple[PackedFile, ...]
    limits: SoundLimits = field(default_factory=SoundLimits)

    def shard_name(self, number: int) -> str:
        """The file name of the task's shard `number`, counted from 0."""
        return f"shard-{self.first_shard + number:06d}.tar"


# A piece of a task: (number of its file among the members, number of the piece in the file).
Piece = tuple[int, int]


def piece_counts(samples: np.ndarray, most: int) -> np.ndarray:
    """int64 [files]: the number of pieces of at most `most` samples (0: any length) that each file is cut into."""
    if not most:
        return np.ones(len(samples), np.int64)
    return np.maximum(1, -(-samples // most))


def keyed_hash(seed: int, purpose: str, name: str) -> int:
    """A hash below 2**64 of a name; `purpose` makes the hashes of different choices independent."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{purpose}/{name}".encode())


def layout(task: PackTask) -> list[list[Piece]]:
    """The pieces of each shard of the task, in the order of the tar. No shard is empty."""
    pieces = [(number, piece) for number, member in enumerate(task.members) for piece in range(member.pieces)]
    if task.shards == 1 and all(member.pieces == 1 for member in task.members):
        return [pieces]
    keys = {at: task.members[at[0]].piece_key(at[1]) for at in pieces}
    pieces.sort(key=lambda at: (keyed_hash(task.seed, "pieces", keys[at]), keys[at]))
    total = max(1, sum(member.samples for member in task.members))
    shards: list[list[Piece]] = [[] for _ in range(task.shards)]
    before = 0
    for number, piece in pieces:
        shards[min(task.shards - 1, before * task.shards // total)].append((number, piece))
        before += task.members[number].start(piece + 1) - task.members[number].start(piece)
    return shards


def cut(blocks: Iterable[np.ndarray], member: PackedFile) -> Iterator[np.ndarray]:
    """Yields the pieces of a file, float32; one piece is in memory at a time.

    If the signal is shorter than its header states, there are fewer pieces, and the last one is shorter. If it is
    longer, the last piece is longer.
    """
    held: list[np.ndarray] = []
    at, piece = 0, 0
    for block in blocks:
        while piece < member.pieces - 1 and at + len(block) >= member.start(piece + 1):
            here = member.start(piece + 1) - at
            yield np.concatenate([*held, block[:here]])
            held, at, piece, block = [], at + here, piece + 1, block[here:]
        if len(block):
            held.append(block)
            at += len(block)
    if held or member.pieces == 1:
        yield np.concatenate([np.zeros(0, np.float32), *held])
