"""A running mean of the weights, which often scores better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_Tensors = list[Tensor] | tuple[Tensor, ...]


def mean_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean weights in what `Ema.state` returned, under the model's own names."""
    inner = "module."
    return {name.removeprefix(inner): tensor for name, tensor in state.items() if name.startswith(inner)}


class Ema:
    """The exponential moving average of a model's parameters (Polyak and Juditsky 1992; torch's AveragedModel).

    Update number t (from 0) keeps min(decay, (1 + t) / (10 + t)) of the mean, so that early weights are soon forgotten;
    update 0 is the weights themselves. Buffers are copied. All is a function of the weights and of the number of
    updates, so ranks with the same weights have the same mean.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._mean = AveragedModel(model, multi_avg_fn=self._average)

    def update(self) -> None:
        """Takes in the model's weights: once after every update, also of one that was skipped for not being finite:
        whether it was is known to the device alone, and a mean of weights that stay comes to no harm."""
        self._mean.update_parameters(self._model)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs, no copies: `n_averaged`, and `module.NAME` for each name of the model's state."""
        return {name: tensor.detach() for name, tensor in self._mean.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state` returned."""
        self._mean.load_state_dict(state)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the mean weights; after it its own again, bit for bit, however it ends.

        Values are copied, not tensors exchanged: the fused GRU and compiled graphs hold on to the tensors.
        """
        kept = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        try:
            self._model.load_state_dict(self._mean.module.state_dict())
            yield
        finally:
            self._model.load_state_dict(kept)

    def _average(self, mean: _Tensors, weights: _Tensors, _updates: Tensor | int) -> None:
        # Counted on the CPU: to read the count that comes from the weights' device would wait for it.
        updates = int(self._mean.n_averaged)
        kept = min(self._decay, (1 + updates) / (10 + updates))
        get_ema_multi_avg_fn(kept)(mean, weights, updates)
