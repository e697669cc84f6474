"""Sets up a rank: the newest checkpoint, the order of the data from there on, the network, the optimiser, the saver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from cpcscale.errors import UserError
from cpcscale.model.cost import NetworkCost, network_cost
from cpcscale.model.cpc import CPC, build
from cpcscale.runs.ledger import Ledger, RunState
from cpcscale.runs.publisher import Publisher
from cpcscale.shards.index import Index
from cpcscale.stream.feed import FeedSource, fixed_batches
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train import resume
from cpcscale.train.checkpoint import RestoredCheckpoint, RunPosition, restore
from cpcscale.train.constants import set_constants
from cpcscale.train.observer import Observer
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.saver import Saver
from cpcscale.train.step import TrainStep
from cpcscale.train.window_log import WindowLog

# Windows that a front end is calibrated on, and how many are decoded at a time.
_CALIBRATED, _TOGETHER = 256, 16

# Makes the object whose calls are the updates, from the arguments of TrainStep.
StepMaker = Callable[[CPC, Recipe, Ranks, int], TrainStep]


@dataclass(frozen=True)
class Data:
    """The shard set to train on, and the held-out sets by name, such as `heldout` and `unseen`.

    `append`: whether a run that resumes uses shards appended to the set, from the next epoch on.
    """

    train: Index
    validation: Mapping[str, Index]
    append: bool = False


@dataclass(frozen=True)
class RankSetup:
    """All that this rank needs for the next step. Only rank 0 has a `saver`, and only if steps are left.

    `url` is the checkpoint that the run resumes from, `total` the last step, `costs` those of one micro-batch.
    """

    position: RunPosition
    order: RunOrder
    total: int
    step: TrainStep
    window_log: WindowLog | None
    saver: Saver | None
    url: str | None
    costs: NetworkCost


def set_up(
    recipe: Recipe,
    data: Data,
    run_dir: str,
    ranks: Ranks,
    observer: Observer,
    holder: str,
    make_step: StepMaker,
) -> RankSetup:
    """Sets up the run in `run_dir` from its newest checkpoint, or from step 0; rank 0 notifies the observer.

    Raises UserError on every rank when the run cannot resume with this recipe and data, or when another process has
    taken it over.
    """
    windows = shard_windows(data.train, recipe.window, recipe.feed.cache.path)
    ledger = Ledger(run_dir)
    seen = ledger.head() if ranks.first else RunState()
    restored = resume.newest_checkpoint(ledger, seen, ranks)
    position, order = resume.start(restored, recipe, data.train, windows, data.append)
    total = resume.total_steps(recipe, order)
    source = FeedSource(data.train, order, recipe.window, recipe.feed)
    step = _step(recipe, source, ranks, restored, position, total, make_step)
    if recipe.measures and not restored:
        if ranks.first:
            observer.note("measuring training windows, by which acoustic targets are standardised")
        set_constants(step.contrast, FeedSource(data.train, order, recipe.window, recipe.feed, recipe.measures), ranks)
    path = recipe.train.log_window_ids
    window_log = WindowLog(path, data.train, order.lanes, ranks, position.step) if path else None
    # Last of all: from here on no other process may publish.
    saver = _saver(recipe, ledger, seen, ranks, position.step, total, holder)
    share = -(-recipe.train.batch // ranks.world)
    rows = min(recipe.train.micro_batch or share, share)
    costs = network_cost(recipe.model, recipe.window.samples, rows)
    setup = RankSetup(position, order, total, step, window_log, saver, restored.url if restored else None, costs)
    if ranks.first:
        _announce(setup, recipe, data.train, ranks, observer, rows)
    return setup


def new_network(recipe: Recipe, source: FeedSource, ranks: Ranks | None) -> CPC:
    """The network of step 0, the same on all ranks: its weights depend on the seed, its constants on the shard set.

    What takes a pass over audio is measured by rank 0, on windows spread evenly over the order of epoch 0; with `ranks`
    None it is left out, for a checkpoint has it. Raises UserError on every rank when these cannot be read.
    """
    offset, gain = source.index.wave_scale()
    model = build(recipe.model, recipe.seed, offset=offset, gain=gain)
    if ranks is None:
        return model
    error = None
    try:
        if ranks.first:
            model.calibrate(_calibration_windows(source))
    except UserError as failure:
        error = failure
    ranks.raise_on_all(error)
    model.load_state_dict({**model.state_dict(), **ranks.broadcast(model.constants)})
    return model


def _calibration_windows(source: FeedSource) -> Iterator[np.ndarray]:
    """The audio of the windows, int16 [S] each, without padding; nothing of windows that do not count."""
    total = source.order.epoch_order.total
    positions = np.linspace(0, total, min(total, _CALIBRATED), endpoint=False).astype(np.int64)
    for batch in fixed_batches(source, positions, _TOGETHER):
        for wave_S, samples in zip(batch.wave_BS, batch.samples_B.tolist(), strict=True):
            yield wave_S[:samples]


def _step(
    recipe: Recipe,
    source: FeedSource,
    ranks: Ranks,
    restored: RestoredCheckpoint | None,
    position: RunPosition,
    total: int,
    make_step: StepMaker,
) -> TrainStep:
    model = new_network(recipe, source, None if restored else ranks)
    origin = resume.initial_network(restored, recipe)
    if origin:
        resume.load_initial_weights(model, origin[0])
    step = make_step(model.to(ranks.device), recipe, ranks, total)
    if restored:
        restore(restored, step.contrast, step.optimizer, step.ema)
        if position.scaler:
            step.scaler.load_state_dict(position.scaler)
    return step


def _saver(
    recipe: Recipe, ledger: Ledger, seen: RunState, ranks: Ranks, step: int, total: int, holder: str
) -> Saver | None:
    saver, error = None, None
    if ranks.first and step < total:
        try:
            spec = recipe.checkpoint
            publisher = Publisher(ledger, seen, step, keep=spec.keep, holder=holder, best_by=spec.best_by)
            saver = Saver(publisher, recipe)
        except UserError as failure:
            error = failure
    ranks.raise_on_all(error)
    return saver


def _announce(setup: RankSetup, recipe: Recipe, index: Index, ranks: Ranks, observer: Observer, rows: int) -> None:
    train, lanes, costs = recipe.train, setup.order.lanes, setup.costs
    observer.note(
        f"{costs.parameters.total:,} parameters; {index.duration_s / 3600:.2f} h in {lanes.windows:,} windows of "
        f"{recipe.window.seconds:g} s, {lanes.steps_per_epoch:,} steps an epoch at batch {train.batch}; "
        f"{setup.total:,} steps, {ranks.world} worker(s), {train.precision} on {ranks.device.type}"
    )
    observer.note(
        f"{costs.parameters.kept:,} parameters kept at inference; {costs.frames_per_s:g} frames a second with a "
        f"receptive field of {costs.receptive_ms:.1f} ms; {costs.flops_per_s.total / 1e9:.3g} GFLOP forward for a "
        f"second of audio, 3 times that to train; about {costs.memory_mib:,.0f} MiB in fp32 for {rows} windows at once"
    )
    if setup.url:
        observer.note(f"going on from {setup.url}: step {setup.position.step} of {setup.total}")
        if changed := resume.describe_rate_change(setup.position, recipe.optim, setup.total):
            observer.note(changed)
        for step, values in setup.position.records:
            observer.replayed(step, values)
