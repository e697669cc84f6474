import pytest
import torch

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import ConvEncoder, EncoderConfig


def encoder(norm: str, groups: int = 8) -> ConvEncoder:
    return build(config.build(ModelConfig, {"encoder": {"channels": 16, "norm": norm, "groups": groups}}), 0).encoder


def test_the_first_convolution_starts_from_kaimings_initialisation_with_zero_biases():
    layer = build(ModelConfig(), 0).encoder.layers[1]
    fan_in = layer.weight[0].numel()
    assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize(("norm", "groups"), [("channel", 1), ("group", 1), ("group", 4)])
def test_a_norm_is_of_each_frame_by_itself_over_its_groups_of_channels(norm, groups):
    layer = encoder(norm, groups).norms[0]
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x_BSC = 3 + 5 * torch.randn(2, 9, 16)
    split = x_BSC.reshape(2, 9, groups, -1)
    scaled = (split - split.mean(-1, keepdim=True)) / (split.var(-1, unbiased=False, keepdim=True) + 1).sqrt()
    expected = scaled.reshape(2, 9, 16) * layer.weight + layer.bias
    torch.testing.assert_close(layer(x_BSC), expected)


@pytest.mark.parametrize(("epsilon", "louder"), [(1.0, True), (1e-5, False)])
def test_loud_and_quiet_differ_behind_norms_unless_their_epsilon_is_next_to_nothing(epsilon, louder):
    torch.manual_seed(1)
    network = ConvEncoder(
        EncoderConfig(channels=16, kernels=[10, 8], strides=[5, 4], norm="channel", norm_epsilon=epsilon)
    )
    wave_BS = torch.randn(1, 4000)
    quiet, loud = (network(gain * wave_BS).abs().mean().item() for gain in (0.1, 1.0))
    assert (loud > 2 * quiet) == louder


def test_without_a_norm_there_are_no_weights_of_one():
    assert {name.split(".")[0] for name in encoder("none").state_dict()} == {"layers"}
    assert {name.split(".")[0] for name in encoder("channel").state_dict()} == {"layers", "norms"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kernels": [10, 8], "strides": [5]}, "differ in length"),
        ({"kernels": [4], "strides": [5]}, "skip samples"),
        ({"kernels": [3], "strides": [0]}, "skip samples"),
        ({"channels": -1}, "model.encoder.channels=-1 is below 0"),
        ({"norm_epsilon": 0.0}, "model.encoder.norm_epsilon=0.0 is below 1e-09"),
        ({"groups": 0}, "model.encoder.groups=0 is below 1"),
        ({"channels": 12, "norm": "group"}, r"groups=8 does not split channels=12 .* use groups=4, or norm=channel"),
    ],
)
def test_a_stack_that_cannot_be_is_refused_with_the_way_out(values, words):
    with pytest.raises(UserError, match=words):
        EncoderConfig(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        # Whatever half of it the size fills in.
        ({"kernels": [10, 8]}, "differ in length"),
        ({"strides": [5, 4]}, "differ in length"),
        ({"norm": "group", "groups": 7}, "groups=7 does not split channels=128"),
        ({"norm": "batch"}, "'batch'"),
    ],
)
def test_what_does_not_fit_the_size_is_refused_too(values, words):
    with pytest.raises(UserError, match=words):
        config.build(ModelConfig, {"encoder": values})
