"""The start of a run: the position of its newest checkpoint, refused if it belongs to another recipe or shard set."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC
from cpcscale.runs.ledger import Ledger, RunState
from cpcscale.shards.index import Index
from cpcscale.stream.run_order import Chapter, RunOrder
from cpcscale.stream.window_counts import WindowSpeakers
from cpcscale.train import checkpoint
from cpcscale.train.checkpoint import RestoredCheckpoint, RunPosition, load_checkpoint
from cpcscale.train.optim import OptimConfig, learning_rate
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe


def newest_checkpoint(ledger: Ledger, state: RunState, ranks: Ranks) -> RestoredCheckpoint | None:
    """The newest whole checkpoint that rank 0 finds in `state`, on every rank; None when there is none."""
    restored = checkpoint.load_newest(ledger, state) if ranks.first else None
    url = ranks.broadcast(restored.url if restored else None)
    return load_checkpoint(url) if url and not restored else restored


def initial_network(restored: RestoredCheckpoint | None, recipe: Recipe) -> tuple[CPC, dict[str, Any]] | None:
    """(network, metadata) of `init_from`, as `load_encoder` returns them; None without one or if the run resumes.

    Raises UserError when there is no checkpoint, or when its network has another shape than the recipe's.
    """
    if restored or not recipe.init_from:
        return None
    network, metadata = checkpoint.load_encoder(recipe.init_from)
    differing = config.differences({"model": config.identity(network.config)}, {"model": config.identity(recipe.model)})
    if differing:
        raise UserError(
            f"init_from={recipe.init_from} has a network with {differing[0]}: keep the network's shape, or train from "
            "scratch"
        )
    return network, metadata


def load_initial_weights(model: CPC, network: CPC) -> None:
    """Copies what `network` learnt into `model`, which keeps its constants: they depend on the audio."""
    model.load_state_dict({**network.state_dict(), **model.constants})


def start(
    restored: RestoredCheckpoint | None, recipe: Recipe, index: Index, windows: np.ndarray, append: bool
) -> tuple[RunPosition, RunOrder]:
    """The position to start from, the checkpoint's or step 0 of a new run, and the order of the data of the run.

    `windows` are the windows of each shard.

    The shard set may be a newer version of the checkpoint's: excluded utterances are left out from now on, and appended
    shards are used from the next epoch on if `append` is set. Raises UserError when the checkpoint belongs to another
    shard set or to a recipe with other batches or updates, or when it is past the last step.
    """
    if restored is None:
        new = RunPosition(step=0, fingerprint=index.fingerprint, identity=recipe.identity())
        new.chapters = [[0, 0, index.shards.num_rows]]
        return new, _order(new, recipe, index, windows)
    position = restored.position
    differing = config.differences(position.identity, recipe.identity())
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"{restored.url} was trained with {differing[0]}{more}: name another run_dir to start anew, or keep the "
            "value"
        )
    position.chapters = _chapters(restored, recipe, index, windows, append)
    position.fingerprint = index.fingerprint
    order = _order(position, recipe, index, windows)
    total = total_steps(recipe, order)
    if position.step > total:
        raise UserError(
            f"{restored.url} is at step {position.step}, past the {total} steps asked for: name another run_dir to "
            "start anew, or raise train.steps or train.epochs"
        )
    if position.cursors != order.cursors(position.step):
        raise UserError(f"{restored.url} is damaged: its cursors do not belong to step {position.step}")
    return position, order


def _order(position: RunPosition, recipe: Recipe, index: Index, windows: np.ndarray) -> RunOrder:
    chapters, speakers = [Chapter(*values) for values in position.chapters], WindowSpeakers(index, recipe.window)
    lanes, batch, run = recipe.train.lanes, recipe.train.batch, recipe.order.run
    return RunOrder(windows, recipe.seed, lanes, batch, chapters, run=run, speakers=speakers)


def total_steps(recipe: Recipe, order: RunOrder) -> int:
    """The last step of a run."""
    return recipe.train.steps or order.steps_for(recipe.train.epochs)


def describe_rate_change(position: RunPosition, spec: OptimConfig, total: int) -> str:
    """A line about a learning rate that does not go on where it was, for the run has another length now; else ""."""
    before = position.metrics.get("learning_rate")
    if before is None or position.step >= total:
        return ""
    if math.isclose(before, learning_rate(spec, position.step - 1, total), rel_tol=1e-6):
        return ""
    return (
        f"the learning rate was {before:.3g} at step {position.step:,} and goes on at "
        f"{learning_rate(spec, position.step, total):.3g}: optim.schedule={spec.schedule} is spread over {total:,} "
        "steps now, after another train.steps, train.epochs or shard set"
    )


def _chapters(
    restored: RestoredCheckpoint, recipe: Recipe, index: Index, windows: np.ndarray, append: bool
) -> list[list[int]]:
    """The chapters of a run that resumes with this version of its shard set."""
    position = restored.position
    if position.fingerprint == index.fingerprint:
        return position.chapters
    before = index.ancestor(position.fingerprint)
    if before is None:
        raise UserError(
            f"{restored.url} was trained on another shard set (fingerprint {position.fingerprint[:12]}, this one is "
            f"{index.fingerprint[:12]}): name another run_dir to start anew, or the shards it was trained on"
        )
    if before.shards == index.shards.num_rows:
        return position.chapters
    if not append:
        raise UserError(
            f"{index.base} has {index.shards.num_rows - before.shards} shards more than {restored.url} was trained on: "
            "set data.append=true to use them from the next epoch on, or name another run_dir to start anew"
        )
    # Shards of an earlier version that were not in use yet come in with the newest version.
    started = [chapter for chapter in position.chapters if chapter[0] <= position.step]
    order = RunOrder(windows, recipe.seed, recipe.train.lanes, recipe.train.batch, [Chapter(*each) for each in started])
    step, epoch = order.next_epoch(position.step)
    return [*(chapter for chapter in started if chapter[0] < step), [step, epoch, index.shards.num_rows]]
