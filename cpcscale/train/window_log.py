"""Logs the window ids of each global batch as JSON Lines, to check the order of the data or find a bad batch."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from cpcscale.config import read_json
from cpcscale.errors import UserError
from cpcscale.shards.index import Index
from cpcscale.stream.batch import Batch
from cpcscale.stream.lanes import PADDING, Lanes
from cpcscale.train.ranks import Ranks

_START = '{"step": '


class WindowLog:
    """Writes {"step", "epoch", "ids"}: ids `KEY#NUMBER` in the global batch's order, the same with any number of ranks.

    The ids are gathered from the batches that the ranks' feeds delivered, not from the plan. Lines after `step` are
    removed at the start, since a resumed run repeats those steps. Raises UserError on every rank when the file is not
    such a log or cannot be written.
    """

    def __init__(self, path: str, index: Index, lanes: Lanes, ranks: Ranks, step: int) -> None:
        self._path, self._lanes, self._ranks = Path(path), lanes, ranks
        self._bounds, self._shard_of = index.bounds, index.shard_of
        self._keys_of = lru_cache(maxsize=2 * lanes.lanes)(lambda shard: index.rows(shard).table["key"])
        error = None
        if ranks.first:
            try:
                self._truncate(step)
            except (OSError, ValueError, KeyError, TypeError) as failure:
                error = UserError(
                    f"train.log_window_ids={path} cannot hold window ids ({type(failure).__name__}: {failure}): name "
                    "another file"
                )
        ranks.raise_on_all(error)

    def _truncate(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        # A killed run may have left half a line. A file with any other text is not ours and is left alone.
        if lines and not lines[-1].endswith("}") and lines[-1].startswith(_START[: len(lines[-1])]):
            lines.pop()
        kept = [line for line in lines if read_json(line)["step"] <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, step: int, batch: Batch) -> None:
        """Gathers the ids of every rank; rank 0 appends the line of `step`."""
        parts = self._ranks.gather((batch.utterance_B, batch.number_B))
        if not self._ranks.first:
            return
        rows = np.empty((self._lanes.lanes, self._lanes.per_step, 2), np.int64)
        for rank, (utterance_B, number_B) in enumerate(parts):
            mine = np.stack([utterance_B, number_B], axis=1).reshape(-1, self._lanes.per_step, 2)
            rows[rank :: self._ranks.world] = mine
        places = rows.reshape(-1, 2)
        places = places[places[:, 0] != PADDING]
        ids = [
            f"{self._keys_of(shard)[utterance - self._bounds[shard]]}#{number}"
            for shard, (utterance, number) in zip(self._shard_of(places[:, 0]).tolist(), places.tolist(), strict=True)
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "epoch": batch.epoch, "ids": ids}) + "\n")
