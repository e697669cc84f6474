import pytest
import torch
from torch import nn

from cpcscale.model.cpu_gru import gru


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (3, 7), (2, 40)])
@pytest.mark.parametrize("layers", [1, 3])
def test_values_and_gradients_are_those_of_torch(batch, frames, layers):
    module = nn.GRU(6, 5, num_layers=layers, batch_first=True)
    x_BTC = torch.randn(batch, frames, 6, requires_grad=True)
    leaves = [x_BTC, *module.parameters()]
    found, (expected, _) = gru(x_BTC, module), module(x_BTC)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_it_can_be_pushed_back_twice_where_the_graph_is_kept():
    module, x_BTC = nn.GRU(6, 5, batch_first=True), torch.randn(2, 9, 6)
    output = gru(x_BTC, module)
    once, again = (torch.autograd.grad(output.sum(), list(module.parameters()), retain_graph=True) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same():
    module, x_BTC = nn.GRU(6, 5, batch_first=True), torch.randn(2, 9, 6)
    with torch.no_grad():
        output = gru(x_BTC, module)
    assert not output.requires_grad
    torch.testing.assert_close(output, module(x_BTC)[0])
