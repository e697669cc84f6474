import pytest
import torch

from cpcscale.emotion.heads.attention import (
    AttentionHead,
    AttentionHeadConfig,
    EncoderWithHead,
    KeyedDropout,
    average_frames,
    pool,
)
from cpcscale.errors import UserError
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig

FRAMES = (17, 4, 1, 9)


def small(pool_frames: int = 1, width: int = 6) -> AttentionHead:
    torch.manual_seed(0)
    network = AttentionHead(AttentionHeadConfig(heads=2, hidden=8, dense=16, pool_frames=pool_frames), width).double()
    network.standardise(torch.randn(width), torch.rand(width) + 0.5)
    return network


def ragged(width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    # What pads the rows is large: a mask that leaks cannot go unseen.
    x_BTC = 1e3 * torch.randn(len(FRAMES), max(FRAMES), width, dtype=torch.float64)
    for row, frames in enumerate(FRAMES):
        x_BTC[row, :frames] = torch.randn(frames, width, dtype=torch.float64)
    return x_BTC, torch.tensor(FRAMES)


@pytest.mark.parametrize("pool_frames", [1, 4])
def test_a_padded_batch_equals_its_rows_one_by_one(pool_frames):
    network = small(pool_frames).eval()
    x_BTC, frames_B = ragged()
    together = network(x_BTC, frames_B)
    for row, frames in enumerate(FRAMES):
        alone = network(x_BTC[row : row + 1, :frames], frames_B[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("pool_frames", [1, 4])
def test_padding_gets_no_gradient(pool_frames):
    network = small(pool_frames).eval()
    x_BTC, frames_B = ragged()
    x_BTC.requires_grad_()
    network(x_BTC, frames_B).sum().backward()
    for row, frames in enumerate(FRAMES):
        assert (x_BTC.grad[row, frames:] == 0).all()
        assert (x_BTC.grad[row, :frames] != 0).any()


def test_a_padded_batch_of_waveforms_equals_its_rows_one_by_one():
    encoder = build(ModelConfig(encoder=EncoderConfig(channels=4), context=ContextConfig(width=6)), seed=0).double()
    network = EncoderWithHead(encoder, small(2)).eval()
    samples = torch.tensor([1600, 4321, 160])
    wave_BS = torch.zeros(3, 4321, dtype=torch.float64)
    for row, count in enumerate(samples):
        wave_BS[row, :count] = 0.3 * torch.randn(int(count), dtype=torch.float64)
    together = network(wave_BS, samples)
    for row, count in enumerate(samples):
        alone = network(wave_BS[row : row + 1, :count], samples[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=1e-10)


def test_pooling_is_the_mean_and_deviation_over_valid_frames():
    x_BTC, frames_B = ragged()
    mean, deviation = pool(x_BTC, torch.arange(max(FRAMES))[None] < frames_B[:, None])
    for row, frames in enumerate(FRAMES):
        torch.testing.assert_close(mean[row], x_BTC[row, :frames].mean(dim=0))
        torch.testing.assert_close(deviation[row], x_BTC[row, :frames].std(dim=0, correction=0), atol=1e-3, rtol=1e-3)


def test_a_constant_input_has_finite_gradients():
    network = small()
    x_BTC = torch.full((3, 5, 6), 0.7, dtype=torch.float64, requires_grad=True)
    network(x_BTC, torch.tensor([5, 3, 1]), torch.arange(3)).sum().backward()
    assert torch.isfinite(x_BTC.grad).all()
    assert all(torch.isfinite(weight.grad).all() for weight in network.parameters())


def test_averaged_frames_are_means_of_valid_frames_alone():
    x_BTC, frames_B = ragged()
    averaged, counts = average_frames(x_BTC, frames_B, 4)
    assert counts.tolist() == [5, 1, 1, 3]
    torch.testing.assert_close(averaged[0, 4], x_BTC[0, 16])
    torch.testing.assert_close(averaged[3, 1], x_BTC[3, 4:8].mean(dim=0))
    torch.testing.assert_close(averaged[2, 0], x_BTC[2, 0])


def test_a_feature_that_never_varies_is_only_shifted():
    network = AttentionHead(AttentionHeadConfig(heads=1, hidden=4), 2)
    network.standardise(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0]))
    assert network.deviation_C.tolist() == [1.0, 2.0]


def test_the_default_is_the_papers_head():
    network = AttentionHead(AttentionHeadConfig(), 256)
    assert network.config.heads == 8 and network.query_key_value.out_features == 3 * 512
    assert [layer.out_features for layer in network.dense if isinstance(layer, torch.nn.Linear)] == [128, 128, 3]
    assert [layer.p for layer in network.dense if isinstance(layer, KeyedDropout)] == [0.2, 0.2]


def test_in_training_a_padded_batch_equals_its_rows_one_by_one_in_any_order():
    network = small()
    x_BTC, frames_B = ragged()
    key_B = torch.tensor([7, -3, 2**62, 0])
    together = network(x_BTC, frames_B, key_B)
    assert not torch.equal(together, network(x_BTC, frames_B, key_B + 1)), "dropout is on"
    assert torch.equal(together, network(x_BTC, frames_B, key_B)), "keyed, not drawn"
    for row in (2, 0, 3, 1):
        alone = network(x_BTC[row : row + 1, : FRAMES[row]], frames_B[row : row + 1], key_B[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_is_0_with_its_probability_and_keeps_the_mean(p):
    ones, key_B = torch.ones(400, 500), torch.arange(400)
    first, second = (KeyedDropout(p, number)(ones, key_B) for number in (0, 1))
    # Five standard deviations of a share of 200,000.
    close = 5 * (p * (1 - p) / 200_000) ** 0.5
    for dropped in (first, second):
        kept = dropped != 0
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=close)
        torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - p)))
    # Neither layers nor rows nor units lose the same.
    for left, right in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        both = ((left == 0) & (right == 0)).float().mean().item()
        assert both == pytest.approx(p * p, abs=2 * close)


def test_dropped_units_get_no_gradient():
    x_BF = torch.ones(4, 64, requires_grad=True)
    dropped = KeyedDropout(0.5, 0)(x_BF, torch.arange(4))
    dropped.sum().backward()
    assert torch.equal(x_BF.grad, dropped.detach())


def test_dropout_is_off_in_evaluation_and_where_it_is_0_and_refused_without_keys_in_training():
    x_BF = torch.ones(2, 3)
    assert KeyedDropout(0.5, 0).eval()(x_BF, None) is x_BF
    assert KeyedDropout(0.0, 0)(x_BF, None) is x_BF
    with pytest.raises(ValueError, match="pass key_B"):
        KeyedDropout(0.5, 0)(x_BF, None)


@pytest.mark.parametrize(
    ("layer", "width", "unheard"),
    [("c", 6, ("predictor",)), ("z", 4, ("predictor", "context")), ("both", 10, ("predictor",))],
)
def test_every_parameter_that_requires_a_gradient_gets_one(layer, width, unheard):
    encoder = build(ModelConfig(encoder=EncoderConfig(channels=4), context=ContextConfig(width=6)), seed=0).double()
    network = EncoderWithHead(encoder, small(width=width), layer)
    network(torch.randn(2, 1600, dtype=torch.float64), torch.tensor([1600, 800]), torch.arange(2)).sum().backward()
    for name, parameter in network.named_parameters():
        heard = not name.startswith(tuple(f"encoder.{part}" for part in unheard))
        assert (parameter.grad is not None) == parameter.requires_grad == heard, name


def test_impossible_heads_are_refused():
    with pytest.raises(UserError, match=r"hidden=10 is not a multiple of recogniser\.heads=4"):
        AttentionHeadConfig(hidden=10, heads=4)
    with pytest.raises(UserError, match=r"dropout=1\.5"):
        AttentionHeadConfig(dropout=1.5)
