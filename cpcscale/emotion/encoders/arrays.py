"""Networks as arrays by name, as a safetensors file has them, and made again from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Network = TypeVar("Network", bound=nn.Module)
Arrays = dict[str, np.ndarray]


def arrays_of(network: nn.Module, left_out: str = "") -> Arrays:
    """Its weights and buffers; with `left_out`, without those whose names begin so."""
    state = network.state_dict().items()
    return {
        name: tensor.detach().cpu().numpy() for name, tensor in state if not left_out or not name.startswith(left_out)
    }


def filled(build: Callable[[], Network], arrays: Mapping[str, np.ndarray], left_out: str = "") -> Network:
    """The network with these arrays. Raises ValueError unless they are its own, before it takes memory."""
    with torch.device("meta"), _WithoutDraws():
        blank = build().state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in blank.items()}
    if left_out:
        expected = {name: shape for name, shape in expected.items() if not name.startswith(left_out)}
    if expected != {name: array.shape for name, array in arrays.items()}:
        raise ValueError("the arrays are not those of the network")
    network = build()
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, strict=False)
    return network.eval()


def below(arrays: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


class _WithoutDraws(TorchFunctionMode):
    """Leaves out `normal_`, which has nothing to do on meta and imports torch's compiler for it: 2 s and 100 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))
