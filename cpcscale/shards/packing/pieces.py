"""How recordings are cut and what a task of pass 2 is: pure, and known from the lengths alone.

A recording of S samples is cut into the fewest pieces of at most M samples, of lengths that differ by one at most:
piece i of n is [iS/n, (i+1)S/n). A task packs a group of files into one or more shards. The pieces of a group that
holds a cut recording are shuffled over its shards; a group of whole files is one shard, in the order of the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from cpcscale.shards.packing.sources import AudioFile


@dataclass(frozen=True)
class PackedFile:
    """One file of a task: its key, its length at 16 kHz as the header has it, and into how many pieces it is cut."""

    key: str
    source: AudioFile
    samples: int
    pieces: int

    def piece_key(self, piece: int) -> str:
        """The utterance's key: the file's own when it is whole."""
        return self.key if self.pieces == 1 else f"{self.key}/{piece:05d}"

    def start(self, piece: int) -> int:
        """The sample that a piece starts at; of the number after the last, the end of the file."""
        return piece * self.samples // self.pieces


@dataclass(frozen=True)
class PackTask:
    """A group of files and the shards they go to, `first_shard` and on; self-contained, so it runs in any process.

    `note` is where the task writes down what it made; `resumed`: an earlier start of the pack may have done it.
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

    def shard_name(self, number: int) -> str:
        """The file name of the task's shard `number`, counted from 0."""
        return f"shard-{self.first_shard + number:06d}.tar"


# A piece of a task: the number of its file among the members, and its own number in the file.
Piece = tuple[int, int]


def piece_counts(samples: np.ndarray, most: int) -> np.ndarray:
    """int64 [files]: into how many pieces of at most `most` samples (0: any length) each file is cut."""
    if not most:
        return np.ones(len(samples), np.int64)
    return np.maximum(1, -(-samples // most))


def keyed_hash(seed: int, purpose: str, name: str) -> int:
    """A number below 2**64 for this name, by which a choice named `purpose` is made."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{purpose}/{name}".encode())


def layout(task: PackTask) -> list[list[Piece]]:
    """The pieces of each of the task's shards, in their order in the tar. None is empty."""
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
    """The signal of a file, float32, in its pieces; one piece is held at a time.

    A signal shorter than the header has it gives fewer pieces and a last one that ends early. A longer one gives a
    longer last piece.
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
