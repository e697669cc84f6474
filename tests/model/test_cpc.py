import pytest
import torch
from torch import Tensor

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, ModelConfig, build
from cpcscale.model.encoder import EncoderConfig
from cpcscale.train.recipe import Recipe

HOP = 160


def small(steps: int = 4) -> ModelConfig:
    return config.build(
        ModelConfig, {"encoder": {"channels": 12}, "context": {"width": 10}, "predictor": {"steps": steps}}
    )


def speechlike(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model() -> CPC:
    return build(small(), 1, offset=0.01, gain=9.0)


@pytest.mark.parametrize("frame", [0, 1, 7, 19])
def test_samples_after_a_frame_change_nothing_at_or_before_it(model, frame):
    wave, other = speechlike(1, 20 * HOP), speechlike(1, 20 * HOP)
    horizon = (frame + 1) * HOP
    other[:, horizon:] = 7.0
    for before, after in zip(model.features(wave), model.features(other), strict=True):
        torch.testing.assert_close(before[:, : frame + 1], after[:, : frame + 1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("frame", [0, 3, 11])
def test_the_gradient_of_a_frame_reaches_the_last_sample_before_its_horizon_and_none_after(model, frame):
    for which in (0, 1):
        wave = speechlike(1, 16 * HOP).requires_grad_()
        model.features(wave)[which][:, frame].square().sum().backward()
        reached = wave.grad[0].ne(0).nonzero().flatten()
        assert reached.max().item() == (frame + 1) * HOP - 1
        assert which == 0 or reached.min().item() == 0, "c hears everything since the start"


@pytest.mark.parametrize("samples", [160, 161, 319, 320, 1600, 1759, 20_480])
def test_frames_are_whole_hops(model, samples):
    z_BTC, c_BTD = model.features(speechlike(2, samples))
    assert z_BTC.shape == (2, samples // HOP, model.channels)
    assert c_BTD.shape == (2, samples // HOP, model.context_width)


def test_a_padded_batch_equals_its_rows_one_by_one_on_valid_frames(model):
    lengths = [160, 500, 3199, 3200, 4800]
    padded = torch.zeros(len(lengths), 4800)
    rows = [speechlike(1, length) for length in lengths]
    for wave, row in zip(padded, rows, strict=True):
        wave[: row.shape[1]] = row[0]
    batched = model.features(padded)
    for number, row in enumerate(rows):
        for whole, alone in zip(batched, model.features(row), strict=True):
            valid = row.shape[1] // HOP
            torch.testing.assert_close(whole[number, :valid], alone[0], rtol=1e-5, atol=1e-6)


def test_the_papers_network_has_the_papers_size():
    recipe = config.load(Recipe, None)
    network = build(recipe.model, 0)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    kept = sum(size for name, size in sizes.items() if not name.startswith("predictor."))
    assert network.hop_samples == HOP
    # 1.02 M with the linear predictors, 0.63 M kept at inference (PAPER.md).
    assert sum(sizes.values()) == pytest.approx(1.02e6, abs=5e3)
    assert kept == pytest.approx(0.63e6, abs=5e3)


def test_first_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build(small(), 3).state_dict()
    torch.manual_seed(99)
    second = build(small(), 3).state_dict()
    other = build(small(), 4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.layers.0.weight"], other["encoder.layers.0.weight"])


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build(small(), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_first_convolution_starts_from_kaimings_initialisation_with_zero_biases():
    layer = build(ModelConfig(), 0).encoder.layers[1]
    fan_in = layer.weight[0].numel()
    assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
    assert not layer.bias.any()


def test_the_corpus_level_is_part_of_the_network_and_of_its_weights():
    levelled, plain = build(small(), 1, offset=0.25, gain=3.0), build(small(), 1)
    wave = speechlike(1, 1600)
    for heard, expected in zip(levelled.features(wave), plain.features((wave - 0.25) * 3.0), strict=True):
        torch.testing.assert_close(heard, expected)
    assert {"offset", "gain"} <= set(levelled.state_dict())
    assert not {"offset", "gain"} & {name for name, _ in levelled.named_parameters()}


def test_a_prediction_has_one_row_for_each_step_ahead(model):
    _, c_BTD = model.features(speechlike(2, 1600))
    assert model.predictor(c_BTD).shape == (2, 10, 4, model.channels)


@pytest.mark.parametrize(
    ("kernels", "strides", "words"),
    [([10, 8], [5], "differ in length"), ([4], [5], "skip samples"), ([], [], "differ in length"), ([3], [0], "skip")],
)
def test_a_convolution_stack_that_loses_samples_is_refused(kernels, strides, words):
    with pytest.raises(UserError, match=words):
        EncoderConfig(kernels=kernels, strides=strides)
