import pytest
import torch

from cpcscale.emotion.recogniser import EndToEnd, Recogniser, RecogniserConfig, average_frames, pool
from cpcscale.errors import UserError
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig

FRAMES = (17, 4, 1, 9)


def small(pool_frames: int = 1, width: int = 6) -> Recogniser:
    torch.manual_seed(0)
    network = Recogniser(RecogniserConfig(heads=2, hidden=8, dense=16, pool_frames=pool_frames), width).double()
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
    network = EndToEnd(encoder, small(2)).eval()
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
    network(x_BTC, torch.tensor([5, 3, 1])).sum().backward()
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
    network = Recogniser(RecogniserConfig(heads=1, hidden=4), 2)
    network.standardise(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 2.0]))
    assert network.deviation_C.tolist() == [1.0, 2.0]


def test_the_default_is_the_papers_head():
    network = Recogniser(RecogniserConfig(), 256)
    assert network.config.heads == 8 and network.query_key_value.out_features == 3 * 512
    assert [layer.out_features for layer in network.dense if isinstance(layer, torch.nn.Linear)] == [128, 128, 3]
    assert [layer.p for layer in network.dense if isinstance(layer, torch.nn.Dropout)] == [0.2, 0.2]


def test_impossible_heads_are_refused():
    with pytest.raises(UserError, match=r"hidden=10 does not divide by recogniser\.heads=4"):
        RecogniserConfig(hidden=10, heads=4)
    with pytest.raises(UserError, match=r"dropout=1\.5"):
        RecogniserConfig(dropout=1.5)
