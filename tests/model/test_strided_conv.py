import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale.model.strided_conv import causal_conv


def padded(x_BSC: Tensor, layer: nn.Conv1d) -> Tensor:
    """The definition: torch's convolution with zeros in front."""
    pad = layer.kernel_size[0] - layer.stride[0]
    return layer(F.pad(x_BSC.transpose(1, 2), (pad, 0))).transpose(1, 2)


# Waveforms, kernels of 1, 2, 3 and 5 strides, kernels that are no multiple, one stride, few frames.
SHAPES = [
    (1, 12, 10, 5, 100),
    (1, 12, 10, 5, 5),
    (16, 12, 8, 4, 40),
    (16, 7, 4, 4, 40),
    (16, 7, 12, 4, 40),
    (40, 7, 5, 1, 9),
    (40, 7, 5, 1, 3),
    (16, 7, 9, 4, 40),
    (16, 7, 8, 4, 4),
]


@pytest.mark.parametrize(("channels", "out", "kernel", "stride", "samples"), SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_values_and_gradients_are_those_of_torch(channels, out, kernel, stride, samples, batch):
    layer = nn.Conv1d(channels, out, kernel, stride)
    x_BSC = torch.randn(batch, samples, channels, requires_grad=True)
    leaves = [x_BSC, layer.weight, layer.bias]
    found, expected = causal_conv(x_BSC, layer), padded(x_BSC, layer)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", [0, 3, 4, 41, 43])
def test_samples_past_the_last_whole_stride_are_left_out(samples):
    layer, x_BSC = nn.Conv1d(16, 7, 8, 4), torch.randn(2, samples, 16)
    found = causal_conv(x_BSC, layer)
    assert found.shape == (2, samples // 4, 7)
    if samples >= 4:
        torch.testing.assert_close(found, causal_conv(x_BSC[:, : samples // 4 * 4], layer))


def test_a_relu_may_overwrite_the_output():
    layer, x_BSC = nn.Conv1d(16, 7, 8, 4), torch.randn(2, 40, 16)
    F.relu(causal_conv(x_BSC, layer), inplace=True).sum().backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    F.relu(padded(x_BSC, layer)).sum().backward()
    torch.testing.assert_close(gradient, layer.weight.grad, rtol=1e-4, atol=1e-5)


def test_under_autocast_it_computes_in_that_precision_and_its_gradients_are_near():
    layer, x_BSC = nn.Conv1d(16, 7, 8, 4), torch.randn(2, 400, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = causal_conv(x_BSC, layer)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    near = layer.weight.grad.clone()
    layer.zero_grad()
    padded(x_BSC, layer).square().sum().backward()
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, layer.weight.grad, rtol=0.05, atol=0.05 * layer.weight.grad.abs().max().item())
