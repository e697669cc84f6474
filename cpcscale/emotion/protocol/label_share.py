"""Fewer labels: a keyed share of the training part of each fold, for curves over how much is labelled. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from cpcscale.emotion.protocol.splits import Folds


def share_marks(share: float) -> list[str]:
    """What goes with every figure of less than all labels, as LABELS-0.25."""
    return [] if share == 1 else [f"LABELS-{share:g}"]


def with_share(folds: Folds, keys: Sequence[str], share: float, seed: int) -> Folds:
    """The folds with that share of the utterances of each training and development speaker, at least one of each.

    `keys` has the key of each row. Test parts stay as they are. The draw is keyed by (seed, key), and nested: a share
    holds all that a smaller one holds. Rows without a group are drawn from together.
    """
    if share == 1:
        return folds

    def drawn(rows: Sequence[int]) -> tuple[int, ...]:
        of_group: dict[str, list[int]] = {}
        for row in rows:
            of_group.setdefault(folds.groups[row], []).append(row)
        return tuple(sorted(row for mine in of_group.values() for row in _first(mine, keys, share, seed)))

    parts = [(drawn(split.train_rows), drawn(split.dev_rows)) for split in folds.splits]
    splits = [
        dataclasses.replace(split, train_rows=train, dev_rows=dev)
        for split, (train, dev) in zip(folds.splits, parts, strict=True)
    ]
    return dataclasses.replace(folds, splits=tuple(splits))


def _first(rows: Sequence[int], keys: Sequence[str], share: float, seed: int) -> list[int]:
    order = sorted(rows, key=lambda row: hashlib.sha256(f"labelled/{seed}/{keys[row]}".encode()).digest())
    return order[: max(1, round(share * len(rows)))]
