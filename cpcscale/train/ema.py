"""A running mean of the weights, which often scores better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_Tensors = list[Tensor] | tuple[Tensor, ...]


def mean_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean weights from a state of `Ema.state`, under the model's own names."""
    inner = "module."
    return {name.removeprefix(inner): tensor for name, tensor in state.items() if name.startswith(inner)}


class Ema:
    """The exponential moving average of a model's parameters (Polyak and Juditsky 1992; torch's AveragedModel).

    Update number t (from 0) keeps min(decay, (1 + t) / (10 + t)) of the mean, so that early weights fade fast; update 0
    takes the weights themselves. Buffers are copied. The mean depends only on the weights and the number of updates, so
    ranks with the same weights have the same mean.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._mean = AveragedModel(model, multi_avg_fn=self._average)

    def update(self) -> None:
        """Adds the model's weights to the mean; to be called after every update, also a skipped one.

        Only the device knows whether an update was skipped, and unchanged weights do the mean no harm.
        """
        self._mean.update_parameters(self._model)

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint, not copied: `n_averaged`, and `module.NAME` for each name in the model."""
        return {name: tensor.detach() for name, tensor in self._mean.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        self._mean.load_state_dict(state)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the mean weights for the block, then its own weights again, bit for bit.

        Values are copied and tensors stay in place, because the fused GRU and compiled graphs refer to them.
        """
        kept = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        try:
            self._model.load_state_dict(self._mean.module.state_dict())
            yield
        finally:
            self._model.load_state_dict(kept)

    def _average(self, mean: _Tensors, weights: _Tensors, _updates: Tensor | int) -> None:
        # Counted on the CPU: reading the count from the weights' device would wait for that device.
        updates = int(self._mean.n_averaged)
        kept = min(self._decay, (1 + updates) / (10 + updates))
        get_ema_multi_avg_fn(kept)(mean, weights, updates)
