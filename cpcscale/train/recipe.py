"""The whole recipe of one pretraining: every part's config, and the checks between the parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import ModelConfig
from cpcscale.objective.infonce import InfoNCEConfig
from cpcscale.stream.feed import FeedConfig
from cpcscale.stream.window import WindowConfig
from cpcscale.train.augment import AugmentConfig
from cpcscale.train.optim import OptimConfig


@dataclass(kw_only=True)
class TrainConfig:
    """How long and how large."""

    # Updates in all; 0: as many as train.epochs has.
    steps: int = 0
    # Passes over the training set, where steps is 0.
    epochs: float = 50.0
    # Windows in the global batch, over all workers.
    batch: int = 64
    # Equal slices of each epoch that workers serve: the most workers a run can ever have.
    lanes: int = 64
    # Windows a worker pushes through at once; its share of the batch is accumulated in such pieces. 0: all at once.
    micro_batch: int = 0
    # fp16 needs a GPU.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # torch threads of each worker; 0: its share of the node's cores.
    threads: int = field(default=0, metadata=config.PLACE)
    # Updates between two lines, and between two points in MLflow.
    log_every_steps: int = field(default=10, metadata=config.PLACE)
    # Updates between two validations; the last update has one as well.
    validate_every_steps: int = 100
    # Fixed windows of each held-out set that a validation scores, at most.
    validate_windows: int = 512
    # Updates skipped for a loss or gradient that is not finite before the run stops, where a step is logged.
    nonfinite_budget: int = 10
    # A JSON Lines file for the window ids of each global batch; empty: none.
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
            raise UserError(f"train.steps=0 and train.epochs={self.epochs} train nothing: set either above 0")


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are made and which stay."""

    # Updates between two checkpoints; the last update has one as well.
    every_steps: int = 500
    # The newest this many stay, and the best.
    keep: int = 2
    # What the best is best by: the lowest held-out loss, or the highest mean CCC of a probe (cpcscale pretrain, probe).
    best_by: Literal["loss", "probe"] = "loss"

    def __post_init__(self) -> None:
        config.at_least(1, **{"checkpoint.every_steps": self.every_steps, "checkpoint.keep": self.keep})


@dataclass(kw_only=True)
class Recipe:
    """Everything that decides what a pretraining computes; the defaults are those of Li et al. 2021."""

    # Keys the weights, the order of the data and every random choice.
    seed: int = 0
    # A run folder or checkpoint with whose weights a new run begins, on audio of its own; empty: from scratch.
    init_from: str = ""
    window: WindowConfig = field(default_factory=lambda: WindowConfig(kind="crop", seconds=10.0))
    feed: FeedConfig = field(default_factory=FeedConfig, metadata=config.PLACE)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: InfoNCEConfig = field(default_factory=InfoNCEConfig)
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

    def identity(self) -> dict[str, Any]:
        """What may not change when a run goes on: all that its coming batches and updates are a function of."""
        whole = config.identity(self)
        train = {name: whole["train"][name] for name in ("batch", "lanes")}
        kept = ("seed", "init_from", "window", "model", "objective", "augment", "optim")
        return {**{name: whole[name] for name in kept}, "train": train}
