"""Where a run goes on: the position of its newest checkpoint, refused when it belongs to another run."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC
from cpcscale.runs.ledger import Ledger, RunState
from cpcscale.shards.index import Index
from cpcscale.stream.run_order import Chapter, RunOrder
from cpcscale.train import checkpoint
from cpcscale.train.checkpoint import RestoredCheckpoint, RunPosition, load_checkpoint
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe


def newest_checkpoint(ledger: Ledger, state: RunState, ranks: Ranks) -> RestoredCheckpoint | None:
    """The checkpoint that rank 0 chooses of what it knows of the run, on every rank; None when there is none."""
    restored = checkpoint.load_newest(ledger, state) if ranks.first else None
    url = ranks.broadcast(restored.url if restored else None)
    return load_checkpoint(url) if url and not restored else restored


def initial_network(restored: RestoredCheckpoint | None, recipe: Recipe) -> tuple[CPC, dict[str, Any]] | None:
    """The network whose weights a new run begins with and what `load_encoder` says of it; None for any other run.

    Raises UserError when there is none at `init_from`, or of another shape than the recipe's.
    """
    if restored or not recipe.init_from:
        return None
    network, metadata = checkpoint.load_encoder(recipe.init_from)
    differing = config.differences({"model": config.identity(network.config)}, {"model": config.identity(recipe.model)})
    if differing:
        raise UserError(
            f"init_from={recipe.init_from} has a network with {differing[0]}: keep the network's shape, or begin from "
            "scratch"
        )
    return network, metadata


def load_initial_weights(model: CPC, network: CPC) -> None:
    """Puts the weights of `network` into `model`, which keeps the level of its own audio."""
    own = ("offset", "gain")
    weights = {name: tensor for name, tensor in network.state_dict().items() if name not in own}
    model.load_state_dict({**model.state_dict(), **weights})


def start_position(
    restored: RestoredCheckpoint | None, recipe: Recipe, index: Index, windows: np.ndarray, append: bool
) -> RunPosition:
    """Where to start: the checkpoint's position, or step 0 of a new run; `windows` as of Order.

    A newer version of the checkpoint's shard set is taken over: excluded utterances count for nothing from now on,
    appended shards enter at the next edge of an epoch when `append` is set. Raises UserError when the checkpoint is of
    other data, of a recipe whose coming batches would differ, or past the last step asked for.
    """
    if restored is None:
        begun = RunPosition(step=0, fingerprint=index.fingerprint, identity=recipe.identity())
        begun.chapters = [[0, 0, index.shards.num_rows]]
        return begun
    there = restored.position
    differing = config.differences(there.identity, recipe.identity())
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"{restored.url} was trained with {differing[0]}{more}: name another run_dir to start anew, or keep the "
            "value"
        )
    there.chapters = _chapters(restored, recipe, index, windows, append)
    there.fingerprint = index.fingerprint
    order = make_order(there, recipe, windows)
    total = total_steps(recipe, order)
    if there.step > total:
        raise UserError(
            f"{restored.url} is at step {there.step}, past the {total} steps asked for: name another run_dir to start "
            "anew, or raise train.steps or train.epochs"
        )
    if there.cursors != order.cursors(there.step):
        raise UserError(f"{restored.url} holds cursors that do not follow from step {there.step}: it is damaged")
    return there


def make_order(position: RunPosition, recipe: Recipe, windows: np.ndarray) -> RunOrder:
    """The order of the run that stands at `start_position`."""
    chapters = [Chapter(*values) for values in position.chapters]
    return RunOrder(windows, recipe.seed, recipe.train.lanes, recipe.train.batch, chapters)


def total_steps(recipe: Recipe, order: RunOrder) -> int:
    """The last step of a run."""
    return recipe.train.steps or order.steps_for(recipe.train.epochs)


def _chapters(
    restored: RestoredCheckpoint, recipe: Recipe, index: Index, windows: np.ndarray, append: bool
) -> list[list[int]]:
    """The chapters of a run that goes on with this version of its shard set."""
    there = restored.position
    if there.fingerprint == index.fingerprint:
        return there.chapters
    before = index.ancestor(there.fingerprint)
    if before is None:
        raise UserError(
            f"{restored.url} was trained on another shard set (fingerprint {there.fingerprint[:12]}, this one is "
            f"{index.fingerprint[:12]}): name another run_dir to start anew, or the shards it was trained on"
        )
    if before.shards == index.shards.num_rows:
        return there.chapters
    if not append:
        raise UserError(
            f"{index.base} has {index.shards.num_rows - before.shards} shards more than {restored.url} was trained on: "
            "set data.append=true to let them in at the next edge of an epoch, or name another run_dir to start anew"
        )
    # What was to come in later than here comes in with the newest version.
    begun = [chapter for chapter in there.chapters if chapter[0] <= there.step]
    order = RunOrder(windows, recipe.seed, recipe.train.lanes, recipe.train.batch, [Chapter(*each) for each in begun])
    step, epoch = order.edge(there.step)
    return [*(chapter for chapter in begun if chapter[0] < step), [step, epoch, index.shards.num_rows]]
