"""What networks that turn waveforms into frames have in common: the layers that recognisers and people take of them.

B rows, S samples, T frames, C features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

Layer = Literal["c", "z", "both", "mix"]


class LayeredNetwork(nn.Module, ABC):
    """waveform -> frames of a layer: the contexts c, the latents z, `both` side by side, or `mix`, all side by side.

    `offset` and `gain` are what it applies to its input by itself. `normalises`: it was pretrained on windows of zero
    mean and unit variance. It must survive pickling, because folds run in other processes.
    """

    # Its name in the table of emotion/encoders/networks.py, by which a saved one is made again.
    kind: ClassVar[str]
    # The layers that differ; `mix` is only listed where it is more than `both`.
    layers: ClassVar[tuple[Layer, ...]] = ("c", "z", "both")
    # The start of the names of arrays that take part in no layer; a recogniser is saved without them.
    unused: ClassVar[str] = ""
    # Whether `settings` are part of its digest, beside its weights.
    digests_settings: ClassVar[bool] = True
    normalises = False
    offset: Tensor | float
    gain: Tensor | float

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that decides its output besides the weights, as plain values."""

    @property
    @abstractmethod
    def hop_samples(self) -> int:
        """Samples between two frames."""

    @property
    @abstractmethod
    def least_samples(self) -> int:
        """The fewest samples that give a frame."""

    @abstractmethod
    def frames(self, samples_B: Tensor) -> Tensor:
        """The number of valid frames, [B], of rows with so many samples."""

    @abstractmethod
    def widths(self, name: Layer) -> tuple[int, ...]:
        """The widths of the layers that lie side by side in this one; their sum is C."""

    @abstractmethod
    def layer(self, wave_BS: Tensor, name: Layer, samples_B: Tensor | None = None) -> Tensor:
        """Features [B, T, C] of float waveforms at 16 kHz; the first `frames` of each row are those of the row alone.

        `wave_BS` must be 0 from `samples_B` on, which is S for all rows where it is not given.
        """

    @abstractmethod
    def freeze_unused(self, name: Layer) -> None:
        """Switches off gradients of the parts that this layer does not depend on: DDP would wait for them."""

    @property
    def library(self) -> str:
        """The library that its output may depend on, beside torch, with its version."""
        return ""

    @abstractmethod
    def untrained(self, seed: int) -> LayeredNetwork:
        """One of the same architecture and input level, with new weights that depend on `seed` alone."""
