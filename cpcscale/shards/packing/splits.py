"""Chooses what is held out, by keyed hash: speakers, or files of each speaker.

A recording is held out as a whole, with all its pieces. The choice does not depend on the codec or the size of shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cpcscale.errors import UserError, nearest
from cpcscale.shards.packing.pieces import keyed_hash
from cpcscale.shards.packing.sources import AudioFiles, values

SPLITS = TRAIN, HELDOUT, UNSEEN = ("train", "heldout", "unseen")
_TRAIN, _HELDOUT, _UNSEEN = range(3)
# How many names to compare with an unknown one, for a hint.
_HINTS = 10_000


def split(
    files: AudioFiles, names: pa.LargeStringArray, seed: int, share: float, by: str, unseen: Sequence[str]
) -> np.ndarray:
    """int8 [files]: the index in SPLITS of each file.

    `share` is held out as `heldout`, by `group` or by `utterance`; all files of the speakers `unseen` become `unseen`.
    Raises UserError for an unknown speaker, and if nothing is left to train on.
    """
    groups = _Groups(files, names)
    numbers = np.full(len(names), _TRAIN, np.int8)
    numbers[np.isin(groups.ids, [groups.find(name) for name in unseen])] = _UNSEEN
    if share > 0:
        left = np.flatnonzero(numbers == _TRAIN)
        if by == "group":
            there = np.unique(groups.ids[left])
            ranking = there[ranked(seed, "heldout", groups.texts(there))]
            held = np.isin(groups.ids[left], ranking[: int(_shares(np.array([len(there)]), share)[0])])
            numbers[left[held]] = _HELDOUT
        else:
            ranking = ranked(seed, "heldout", names, left)
            ranking = ranking[np.argsort(groups.ids[ranking], kind="stable")]
            _, starts, counts = np.unique(groups.ids[ranking], return_index=True, return_counts=True)
            place = np.arange(len(ranking)) - np.repeat(starts, counts)
            numbers[ranking[place < np.repeat(_shares(counts, share), counts)]] = _HELDOUT
    if not (numbers == _TRAIN).any():
        raise UserError(
            "every utterance is held out and none is left to train on: lower heldout_share or unseen_groups"
        )
    return numbers


def speakers(files: AudioFiles, names: pa.LargeStringArray) -> np.ndarray:
    """int64 [files]: a number that is equal for files of one speaker; a file without one has its own."""
    return _Groups(files, names).ids


def ranked(seed: int, purpose: str, texts: pa.LargeStringArray, rows: np.ndarray | None = None) -> np.ndarray:
    """int64: the rows of `texts` (all, or these) sorted by keyed hash, and by text where hashes are equal."""
    rows = np.arange(len(texts)) if rows is None else rows
    hashes = np.fromiter((keyed_hash(seed, purpose, text) for text in values(texts, rows)), np.uint64, len(rows))
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    ties, order = np.flatnonzero(hashes[1:] == hashes[:-1]), rows[order]
    for first, last in _runs(ties):
        order[first:last] = sorted(order[first:last], key=lambda row: texts[int(row)].as_py())
    return order


class _Groups:
    """Numbers the speaker of each file: an index of the named speakers, or a higher number for a file without one."""

    def __init__(self, files: AudioFiles, names: pa.LargeStringArray) -> None:
        column = files.table["group"].combine_chunks()
        self._named, self._names = column.dictionary, names
        self.ids = pc.fill_null(column.indices, -1).to_numpy().astype(np.int64)
        own = np.flatnonzero(self.ids < 0)
        # The name of a file without a speaker may be the speaker of another file.
        same = pc.fill_null(pc.index_in(pc.take(names, pa.array(own)), value_set=self._named), -1).to_numpy()
        self.ids[own] = np.where(same >= 0, same, len(self._named) + own)

    def texts(self, ids: np.ndarray) -> pa.LargeStringArray:
        """The names of these speakers; `ids` must be ascending."""
        named = int(np.searchsorted(ids, len(self._named)))
        parts = [
            pc.take(self._named, pa.array(ids[:named])),
            pc.take(self._names, pa.array(ids[named:] - len(self._named))),
        ]
        return pa.concat_arrays([part.cast(pa.large_string()) for part in parts])

    def find(self, name: str) -> int:
        """The number of a speaker. Raises UserError if no file has this speaker."""
        at = pc.index(self._named, pa.scalar(name, self._named.type)).as_py()
        if at >= 0 and (self.ids == at).any():
            return int(at)
        row = pc.index(self._names, pa.scalar(name, self._names.type)).as_py()
        if row >= 0 and self.ids[row] == len(self._named) + row:
            return int(self.ids[row])
        known = sorted(self.texts(np.unique(self.ids)[:_HINTS]).to_pylist())
        raise UserError(f"unseen_groups names {name!r}, which no file has as its speaker{nearest(name, known)}")


def _shares(counts: np.ndarray, share: float) -> np.ndarray:
    """How many of each of `counts` to hold out; at least one of two or more."""
    return np.maximum(np.rint(share * counts).astype(np.int64), counts > 1)


def _runs(ties: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (first, end) of each run of equal neighbours; `ties` are the places that equal the next one."""
    for run in np.split(ties, np.flatnonzero(np.diff(ties) > 1) + 1):
        if len(run):
            yield int(run[0]), int(run[-1]) + 2
