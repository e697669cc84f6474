"""The objectives of pretraining: their settings, and the table that names them all."""

from __future__ import annotations

from dataclasses import dataclass, field

from cpcscale import config
from cpcscale.objective.acoustic import AcousticConfig, Frames, Window
from cpcscale.objective.infonce import InfoNCE, InfoNCEConfig
from cpcscale.objective.objective import Objective
from cpcscale.objective.pooled import Pooled, PooledConfig


@dataclass(kw_only=True)
class ObjectiveConfig(InfoNCEConfig):
    """The loss: InfoNCE, to which objectives with a weight above 0 are added; see docs/explanation/objectives.md."""

    acoustic: AcousticConfig = field(default_factory=AcousticConfig, metadata=config.ADDED)
    pooled: PooledConfig = field(default_factory=PooledConfig, metadata=config.ADDED)


def chosen(spec: ObjectiveConfig, steps: int) -> tuple[Objective, ...]:
    """The objectives of a run, InfoNCE first, which is measured even if its weight is 0.

    `steps` is K, how many frames ahead the network predicts.
    """
    infonce, *others = [
        InfoNCE(spec, steps),
        Frames(spec.acoustic),
        Window(spec.acoustic),
        Pooled(spec.pooled),
    ]
    return infonce, *(objective for objective in others if objective.weight)
