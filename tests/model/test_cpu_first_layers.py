import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cpcscale.model import cpu_first_layers as stems
from cpcscale.model.cpc import ModelConfig
from cpcscale.model.cpu_first_layers import fits, stem
from cpcscale.model.encoder import ConvEncoder
from cpcscale.model.strided_conv import causal_conv


def padded(wave_BS: Tensor, first: nn.Conv1d, second: nn.Conv1d) -> Tensor:
    """The definition: torch's convolutions with zeros in front of each."""
    x_BCS = wave_BS.unsqueeze(1)
    x_BCS = F.relu(first(F.pad(x_BCS, (first.kernel_size[0] - first.stride[0], 0))))
    return F.relu(second(F.pad(x_BCS, (second.kernel_size[0] - second.stride[0], 0)))).transpose(1, 2)


def layers(kernel: int, stride: int, times: int, many: int) -> tuple[nn.Conv1d, nn.Conv1d]:
    return nn.Conv1d(1, 6, kernel, stride), nn.Conv1d(6, 5, times * many, many)


@given(
    stride=st.integers(1, 5),
    longer=st.integers(0, 6),
    times=st.integers(1, 4),
    many=st.integers(1, 4),
    frames=st.integers(1, 30),
    batch=st.integers(1, 3),
    a_piece=st.integers(1, 12),
    seed=st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_values_and_gradients_are_those_of_torch_wherever_pieces_end(
    stride, longer, times, many, frames, batch, a_piece, seed
):
    torch.manual_seed(seed)
    first, second = layers(stride + longer, stride, times, many)
    # A bias that would be heard if it stood before the first frame.
    nn.init.constant_(first.bias, 0.5)
    wave_BS = torch.randn(batch, frames * stride * many)
    leaves = [*first.parameters(), *second.parameters()]
    expected = padded(wave_BS, first, second)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stems, "_PIECE", a_piece * 4 * many * first.out_channels)
        found = stem(wave_BS, first, second)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        gradient = torch.randn_like(expected)
        ours = torch.autograd.grad(found, leaves, gradient)
    for one, other in zip(ours, torch.autograd.grad(expected, leaves, gradient), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("samples", [0, 3, 19, 20, 47])
def test_samples_past_the_last_whole_frame_are_left_out(samples, times):
    first, second = layers(10, 5, times, 4)
    wave_BS = torch.randn(2, samples)
    found = stem(wave_BS, first, second)
    found.sum().backward()
    assert found.shape == (2, samples // 20, 5)
    torch.testing.assert_close(found, stem(wave_BS[:, : samples // 20 * 20], first, second), rtol=0, atol=0)


def test_it_can_be_pushed_back_twice_where_the_graph_is_kept():
    first, second = layers(10, 5, 2, 4)
    output = stem(torch.randn(2, 200), first, second)
    leaves = [*first.parameters(), *second.parameters()]
    once, again = (torch.autograd.grad(output.sum(), leaves, retain_graph=True) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_first_layers_output_is_not_kept():
    first, second = layers(10, 5, 2, 4)
    wave_BS, kept = torch.randn(2, 2000), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stem(wave_BS, first, second)
    # The wave, what the two layers make of it, and weights.
    assert sorted(kept)[-2:] == [2 * 100 * 5, wave_BS.numel()]


def test_waves_with_a_gradient_and_other_precisions_go_layer_by_layer():
    wave_BS = torch.randn(1, 200)
    assert fits(wave_BS)
    assert not fits(wave_BS.clone().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits(wave_BS)
    assert not fits(wave_BS.to("meta"))


def test_an_encoder_gives_the_same_with_and_without_it():
    encoder = ConvEncoder(ModelConfig().encoder)
    wave_BS = torch.randn(2, 3200)
    found = encoder(wave_BS)
    x_BSC = wave_BS.unsqueeze(2)
    for layer in encoder.layers:
        x_BSC = F.relu(causal_conv(x_BSC, layer))
    torch.testing.assert_close(found, x_BSC, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(wave_BS.clone().requires_grad_()), found, rtol=1e-4, atol=1e-5)
