"""Where a run goes on: the position of its newest checkpoint, refused when it belongs to another run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpcscale.errors import UserError
from cpcscale.stream.lane import Lanes
from cpcscale.train.checkpoint import Checkpoints, Position, Restored, read
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe


def newest(checkpoints: Checkpoints, ranks: Ranks) -> Restored | None:
    """The checkpoint that rank 0 chooses, on every rank; None when there is none."""
    restored = checkpoints.newest() if ranks.first else None
    url = ranks.chosen(restored.url if restored else None)
    return read(url) if url and not restored else restored


def position(restored: Restored | None, recipe: Recipe, fingerprint: str, lanes: Lanes, total: int) -> Position:
    """Where to start: the checkpoint's position, or step 0 of a new run.

    Raises UserError when the checkpoint is of other data, of a recipe whose coming batches would differ, or past the
    last step asked for.
    """
    if restored is None:
        return Position(step=0, fingerprint=fingerprint, identity=recipe.identity())
    there = restored.position
    if there.fingerprint != fingerprint:
        raise UserError(
            f"{restored.url} was trained on another shard set (fingerprint {there.fingerprint[:12]}, this one is "
            f"{fingerprint[:12]}): name another run_dir to start anew, or the shards it was trained on"
        )
    differing = list(_differing(there.identity, recipe.identity()))
    if differing:
        key, old, new = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"{restored.url} was trained with {key}={old}, this config says {new}{more}: name another run_dir to "
            "start anew, or keep the value"
        )
    if there.step > total:
        raise UserError(
            f"{restored.url} is at step {there.step}, past the {total} steps asked for: name another run_dir to start "
            "anew, or raise train.steps"
        )
    if there.cursors != lanes.cursors(there.step):
        raise UserError(f"{restored.url} holds cursors that do not follow from step {there.step}: it is damaged")
    return there


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differing(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
