"""Packs audio files into a shard set, in two passes that can each run in parallel (`RunTasks`).

Pass 1 reads the header of every file, holds out part of the files, and assigns files to shards; the assignment is
written first. Pass 2 packs each task of it and publishes whole shards, so a pack that was stopped can be continued. The
same files, seed and codec give the same tars. A pack that leaves nothing to train on removes all it made. Memory grows
only with the names of the files, not with rows, results or audio.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpcscale import storage
from cpcscale.audio import RATE_HZ, SoundLimits
from cpcscale.errors import UserError
from cpcscale.shards.account import Account
from cpcscale.shards.index import MARKER, Index
from cpcscale.shards.index_writer import IndexWriter
from cpcscale.shards.packing import quarantine
from cpcscale.shards.packing.assignment import HEAD, NOTES, TABLE, Assignment, PackConfig
from cpcscale.shards.packing.folder_lock import FolderLock
from cpcscale.shards.packing.headers import FileChunks, read_headers
from cpcscale.shards.packing.quarantine import Quarantine
from cpcscale.shards.packing.sources import AudioFile, AudioFiles, find_audio
from cpcscale.shards.packing.splits import HELDOUT, TRAIN, UNSEEN
from cpcscale.shards.packing.write_tars import pack_task
from cpcscale.shards.tasks import RunTasks, in_turn

__all__ = ["HELDOUT", "TRAIN", "UNSEEN", "PackConfig", "PackedSets", "pack", "pack_sources"]

_AT_ONCE = 16


@dataclass(frozen=True)
class PackedSets:
    """The result of a pack: the index of each split; how many files, and pieces of other files, are left out.

    `account` says what became of the audio that was found.
    """

    target: str
    splits: dict[str, Index]
    files_left_out: int
    pieces_left_out: int
    account: Account

    @property
    def quarantine(self) -> list[dict[str, str]]:
        """The rows of the quarantine table, of what is left out: path, piece, cause, why."""
        return list(quarantine.read(self.target))


def pack(source: str, target: str, config: PackConfig, run: RunTasks = in_turn) -> PackedSets:
    """Packs the audio tree at `source` into shard sets `target/train`, `/heldout` and `/unseen`.

    If the same pack is complete, nothing is done. Raises UserError for a source without audio, an unknown speaker in
    `unseen_groups`, or a target that holds another pack.
    """
    return pack_sources(find_audio(source, config), target, config, run)


def pack_sources(sources: Sequence[AudioFile], target: str, config: PackConfig, run: RunTasks = in_turn) -> PackedSets:
    """As `pack`, for a given list of files, whose names must be different."""
    target = storage.absolute(target)
    files = sources if isinstance(sources, AudioFiles) else AudioFiles.of(sources)
    with Quarantine() as left_out, contextlib.ExitStack() as stack:
        samples = _read_lengths(files, config.limits, left_out, run)
        usable = samples >= 0
        found = len(files), float(samples[usable].sum()) / RATE_HZ + left_out.account.left_out_s
        passed_over = files.passed_over
        if not usable.any():
            example = f"; the first: {left_out.first['why']}" if left_out.first else ""
            raise UserError(f"none of the {len(files)} files is audio that can be read{example}")
        files, samples = files.only(usable), samples[usable]
        assignment = Assignment(target, config, files, samples)
        for below in (NOTES, *(f"{split}/utterances" for split in assignment.splits)):
            stack.enter_context(storage.undoing_folders(storage.join(target, below)))
        lock = stack.enter_context(FolderLock(_local_folder(target)))
        assignment.write()
        if assignment.resumed:
            lock.clean([*assignment.splits, NOTES], MARKER)
        lock.share()
        complete = _complete(target, assignment) if assignment.resumed else None
        packed = complete or _pack_shards(target, assignment, left_out, run)
        taken_s = sum(index.duration_s for index in packed.splits.values())
        packed.account.found, packed.account.passed_over = found, passed_over
        packed.account.taken = found[0] - packed.files_left_out, taken_s
        return packed


def _read_lengths(files: AudioFiles, limits: SoundLimits, left_out: Quarantine, run: RunTasks) -> np.ndarray:
    """int64 [files]: the length of each in samples at 16 kHz, or -1 for those left out."""
    samples = np.empty(len(files), np.int64)
    at = 0
    for headers in run(
        read_headers, FileChunks(files), what="reading headers", unit="groups of files", shared=(limits,)
    ):
        samples[at : at + len(headers.samples)] = headers.samples
        at += len(headers.samples)
        left_out.add(headers.left_out)
    return samples


def _pack_shards(target: str, assignment: Assignment, left_out: Quarantine, run: RunTasks) -> PackedSets:
    has_training_data = False
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(IndexWriter(storage.join(target, split))) for split in assignment.splits}
        for task, result in enumerate(run(pack_task, assignment, what="packing", unit="groups of shards")):
            split = assignment.split(task)
            for entry in result.entries:
                writers[split].add(entry)
                has_training_data |= split == TRAIN
            left_out.add(result.left_out)
        if not has_training_data:
            raise _nothing_left(target, assignment, left_out)
        left_out.publish(target)
        indexes = {split: writer.publish() for split, writer in writers.items()}
    _remove_notes(target)
    return PackedSets(target, indexes, left_out.files, left_out.pieces, left_out.account)


def _remove_notes(target: str) -> None:
    folder = storage.join(target, NOTES)
    # A complete pack does not need them, and is complete even if they cannot be removed.
    with contextlib.suppress(UserError):
        if storage.local_path(folder):
            storage.remove(folder)
        elif storage.exists(folder):
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(storage.remove, (storage.join(folder, name) for name in storage.list_files(folder))))


def _nothing_left(target: str, assignment: Assignment, left_out: Quarantine) -> UserError:
    """Removes what was made by a pack without training data; returns the error that says why there is none."""
    for split in assignment.splits:
        base = storage.join(target, split)
        for name in storage.list_files(base) if storage.exists(base) else []:
            if name.startswith("shard-") and name.endswith(".tar"):
                storage.remove(storage.join(base, name))
    _remove_notes(target)
    for name in (HEAD, TABLE):
        storage.remove(storage.join(target, name))
    assert left_out.first is not None
    return UserError(
        f"nothing is left to train on: {left_out.files + left_out.pieces} files or pieces are left out, the first, "
        f"{left_out.first['path']}, because it is {left_out.first['cause']} ({left_out.first['why']})"
    )


def _complete(target: str, assignment: Assignment) -> PackedSets | None:
    """The result of an earlier, complete pack: every index is published and every tar is there. Reads no tar."""
    splits = {}
    left_out, account = [0, 0], Account()
    try:
        for row in quarantine.read(target):
            left_out[bool(row["piece"])] += 1
            account.leave_out(row["cause"], float(row["seconds"]) if row.get("seconds") else None)
        for split in assignment.splits:
            base = storage.join(target, split)
            splits[split] = Index.load(base)
            if not {*splits[split].shards["path"].to_pylist()} <= {*storage.list_files(base)}:
                return None
    except UserError:
        return None
    _remove_notes(target)
    return PackedSets(target, splits, left_out[0], left_out[1], account)


def _local_folder(target: str) -> Path | None:
    """The local folder of the target, made if missing; None for a store."""
    folder = storage.local_path(target)
    if folder:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{target} cannot be made a folder ({error.strerror}): name another target") from None
    return folder
