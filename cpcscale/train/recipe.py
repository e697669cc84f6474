"""The recipe of a pretraining: the config of every part, and the checks between the parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.handmade import targets
from cpcscale.model.cpc import ModelConfig
from cpcscale.objective.objectives import ObjectiveConfig, chosen
from cpcscale.stream.batch import Measures
from cpcscale.stream.feed import FeedConfig
from cpcscale.stream.run_order import OrderConfig
from cpcscale.stream.window import WindowConfig
from cpcscale.train.augment import AugmentConfig
from cpcscale.train.optim import OptimConfig


@dataclass(kw_only=True)
class TrainConfig:
    """The length and the batch of a training, and how often it logs and validates."""

    # Number of updates; 0: as many as train.epochs needs.
    steps: int = 0
    # Passes over the training set, used when steps is 0.
    epochs: float = 50.0
    # Windows in the global batch, over all workers.
    batch: int = 64
    # Equal slices of each epoch, shared out over the workers: the largest number of workers that a run can ever have.
    lanes: int = 64
    # Windows in one forward and backward pass; a worker accumulates its share of the batch in such pieces. 0: all at
    # once.
    micro_batch: int = 0
    # Precision of the forward and backward pass; fp16 needs a GPU.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # torch threads of each worker; 0: its share of the node's cores.
    threads: int = field(default=0, metadata=config.PLACE)
    # Updates between two log lines and two points in MLflow.
    log_every_steps: int = field(default=10, metadata=config.PLACE)
    # Updates between two validations; the last update is always followed by one.
    validate_every_steps: int = 100
    # Largest number of windows that a validation scores in each held-out set; always the same windows.
    validate_windows: int = 512
    # The run stops once more updates than this were skipped because a loss or gradient was not finite; checked when a
    # step is logged.
    nonfinite_budget: int = 10
    # A JSON Lines file that gets the window ids of each global batch; empty: none.
    log_window_ids: str = field(default="", metadata=config.PLACE)

    def __post_init__(self) -> None:
        config.at_least(0, **{"train.steps": self.steps, "train.micro_batch": self.micro_batch})
        config.at_least(0, **{"train.threads": self.threads, "train.nonfinite_budget": self.nonfinite_budget})
        config.at_least(1, **{"train.batch": self.batch, "train.lanes": self.lanes})
        config.at_least(1, **{"train.log_every_steps": self.log_every_steps})
        config.at_least(1, **{"train.validate_every_steps": self.validate_every_steps})
        if "://" in self.log_window_ids:
            raise UserError(f"train.log_window_ids={self.log_window_ids} is not on a local disk: name a path")
        if not self.steps and self.epochs <= 0:
            raise UserError(f"train.steps=0 and train.epochs={self.epochs} train nothing: set one of them above 0")
        if self.steps and self.epochs != type(self).epochs:
            raise UserError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} both say how long: for epochs, set "
                "train.steps=0"
            )


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are made and which are kept."""

    # Updates between two checkpoints; the last update is always followed by one.
    every_steps: int = 500
    # How many of the newest checkpoints are kept, beside the best one.
    keep: int = 2
    # How the best checkpoint is chosen: by the lowest held-out loss, or by the highest mean CCC of a probe.
    best_by: Literal["loss", "probe"] = "loss"

    def __post_init__(self) -> None:
        config.at_least(1, **{"checkpoint.every_steps": self.every_steps, "checkpoint.keep": self.keep})


@dataclass(kw_only=True)
class Recipe:
    """Everything that decides what a pretraining computes; the defaults are those of Li et al. 2021."""

    # Seed of the initial weights, the order of the data and every random choice.
    seed: int = 0
    # A run folder or checkpoint whose weights a new run starts from, on its own audio; empty: from scratch.
    init_from: str = ""
    window: WindowConfig = field(default_factory=lambda: WindowConfig(kind="crop", seconds=10.0))
    order: OrderConfig = field(default_factory=OrderConfig, metadata=config.ADDED)
    feed: FeedConfig = field(default_factory=FeedConfig, metadata=config.PLACE)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        hop, samples = self.model.encoder.hop_samples, self.window.samples
        if samples % hop:
            raise UserError(
                f"window.seconds={self.window.seconds} is {samples} samples, not a multiple of the encoder's hop of "
                f"{hop}: use {samples // hop * hop / 16000:g} s"
            )
        frames, steps = samples // hop, self.model.predictor.steps
        if frames <= steps + 1:
            raise UserError(
                f"window.seconds={self.window.seconds} is {frames} frames, too short to predict "
                f"model.predictor.steps={steps} ahead: use longer windows or fewer steps"
            )

        share = self.train.batch // self.train.lanes
        if share % self.order.run:
            raise UserError(
                f"order.run={self.order.run} does not divide train.batch / train.lanes = {share}: use a divisor of it, "
                "or fewer lanes"
            )
        if not any(objective.weight for objective in chosen(self.objective, steps)):
            raise UserError("objective.weight=0 and no other objective has a weight: nothing would be learnt")
        if self.measures and hop != targets.HOP_SAMPLES:
            raise UserError(
                f"objective.acoustic needs frames of {targets.HOP_SAMPLES} samples, and the encoder's hop is {hop}: "
                "set strides whose product is that, or leave the acoustic weights at 0"
            )

    @property
    def measures(self) -> Measures | None:
        """What the feed measures of each window; None if no objective needs it."""
        acoustic = self.objective.acoustic
        if not (acoustic.frames or acoustic.window):
            return None
        return Measures(targets.measure, targets.HOP_SAMPLES, len(targets.FRAME_NAMES), len(targets.WINDOW_NAMES))

    def identity(self) -> dict[str, Any]:
        """The settings that must not change when a run resumes: all that its later batches and updates depend on."""
        whole = config.identity(self)
        train = {name: whole["train"][name] for name in ("batch", "lanes")}
        kept = ("seed", "init_from", "window", "order", "model", "objective", "augment", "optim")
        # A key at a default that came later is not part of it.
        return {**{name: whole[name] for name in kept if name in whole}, "train": train}
