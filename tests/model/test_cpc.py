import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cpcscale import config
from cpcscale.model.cpc import CPC, ModelConfig, build
from cpcscale.train.recipe import Recipe

HOP = 160
# Every value of every choice at least once, small.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "channel": {"encoder": {"norm": "channel"}},
    "group": {"encoder": {"norm": "group", "groups": 4}},
    "five layers": {"encoder": {"kernels": [10, 8, 4, 4, 4], "strides": [5, 4, 2, 2, 2], "norm": "channel"}},
    "log mel": {"encoder": {"kind": "logmel"}},
    "log mel, two layers": {
        "encoder": {"kind": "logmel", "bands": 20, "kernels": [2, 3], "strides": [1, 1], "norm": "channel"}
    },
    "deep gru": {"context": {"layers": 4}},
    "lstm": {"context": {"kind": "lstm", "layers": 2}},
    "rotary": {"context": {"kind": "transformer", "layers": 2, "heads": 3}},
    "relative": {"context": {"kind": "transformer", "layers": 2, "heads": 3, "positions": "relative"}},
    "shared rotary": {"predictor": {"kind": "shared", "heads": 2}},
    "shared relative": {"predictor": {"kind": "shared", "heads": 3, "positions": "relative"}},
    "each rotary": {"predictor": {"kind": "each", "heads": 2}},
    "each relative": {"predictor": {"kind": "each", "heads": 4, "positions": "relative"}},
    "transformers": {
        "encoder": {"norm": "channel"},
        "context": {"kind": "transformer", "layers": 1, "heads": 2},
        "predictor": {"kind": "each", "heads": 2},
    },
}
SMALL: dict[str, dict[str, Any]] = {"encoder": {"channels": 16}, "context": {"width": 12}, "predictor": {"steps": 4}}


def small(variant: str = "paper") -> ModelConfig:
    return config.build(ModelConfig, {part: SMALL[part] | VARIANTS[variant].get(part, {}) for part in SMALL})


def speechlike(*shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def outputs(model: CPC, wave_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, c and the predictions, time on the second axis."""
    z_BTC, c_BTD = model.features(wave_BS)
    return z_BTC, c_BTD, model.predictor(c_BTD)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request) -> CPC:
    return build(small(request.param), 1, offset=0.01, gain=9.0)


@pytest.mark.parametrize("frame", [0, 1, 7, 19])
def test_samples_after_a_frame_change_nothing_at_or_before_it(model, frame):
    wave, other = speechlike(1, 20 * HOP), speechlike(1, 20 * HOP)
    horizon = (frame + 1) * HOP
    other[:, horizon:] = 7.0
    for before, after in zip(outputs(model, wave), outputs(model, other), strict=True):
        torch.testing.assert_close(before[:, : frame + 1], after[:, : frame + 1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("frame", [0, 3, 11])
def test_the_gradient_of_a_frame_reaches_the_last_sample_before_its_horizon_and_none_after(model, frame):
    for which in range(3):
        wave = speechlike(1, 16 * HOP).requires_grad_()
        outputs(model, wave)[which][:, frame].square().sum().backward()
        reached = wave.grad[0].ne(0).nonzero().flatten()
        assert reached.max().item() == (frame + 1) * HOP - 1
        assert which == 0 or reached.min().item() == 0, "c hears everything since the start"


@pytest.mark.parametrize("samples", [160, 161, 319, 320, 1600, 1759, 20_480])
def test_frames_are_whole_hops(model, samples):
    z_BTC, c_BTD, predictions_BTKC = outputs(model, speechlike(2, samples))
    assert z_BTC.shape == (2, samples // HOP, model.channels) and z_BTC.is_contiguous()
    assert c_BTD.shape == (2, samples // HOP, model.context_width)
    assert predictions_BTKC.shape == (2, samples // HOP, 4, model.channels)


def test_a_padded_batch_equals_its_rows_one_by_one_on_valid_frames(model):
    lengths = [160, 500, 3199, 3200, 4800]
    padded = torch.zeros(len(lengths), 4800)
    rows = [speechlike(1, length) for length in lengths]
    for wave, row in zip(padded, rows, strict=True):
        wave[: row.shape[1]] = row[0]
    batched = outputs(model, padded)
    for number, row in enumerate(rows):
        for whole, alone in zip(batched, outputs(model, row), strict=True):
            valid = row.shape[1] // HOP
            torch.testing.assert_close(whole[number, :valid], alone[0], rtol=1e-5, atol=1e-6)


def test_every_weight_learns(model):
    """No variant carries a weight that its predictions do not depend on, which would also stop DDP."""
    model.zero_grad()
    z_BTC, _, predictions_BTKC = outputs(model, speechlike(2, 20 * HOP))
    (predictions_BTKC[:, :-1, 0] * z_BTC[:, 1:]).sum().backward(retain_graph=True)
    (predictions_BTKC.square().sum()).backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


def test_half_precision_and_double_precision_hear_the_same(model):
    wave = speechlike(2, 20 * HOP)
    expected = outputs(copy.deepcopy(model).double(), wave.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = outputs(model, wave)
    for double, single, half in zip(expected, outputs(model, wave), rough, strict=True):
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-5)
        assert (half.double() - double).square().mean() < 1e-3 * double.square().mean()


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_weights_depend_on_the_seed_alone(variant):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build(small(variant), 3).state_dict()
    assert torch.equal(before, torch.get_rng_state()), "building leaves the global generator alone"
    torch.manual_seed(99)
    second = build(small(variant), 3).state_dict()
    other = build(small(variant), 4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = {name for name, weight in first.items() if weight.dim() > 1}
    assert all(not torch.equal(first[name], other[name]) for name in drawn)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_as_a_checkpoint_stores_it_builds_the_same_network(variant):
    known = small(variant)
    again = config.build(ModelConfig, dataclasses.asdict(known))
    assert again == known
    assert list(build(again, 0).state_dict()) == list(build(known, 0).state_dict())


def test_the_papers_network_has_the_papers_size_and_the_names_of_its_weights_stay():
    network = build(config.load(Recipe, None).model, 0)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    kept = sum(size for name, size in sizes.items() if not name.startswith("predictor."))
    assert network.hop_samples == HOP
    # 1.02 M with the linear predictors, 0.63 M kept at inference.
    assert sum(sizes.values()) == pytest.approx(1.02e6, abs=5e3)
    assert kept == pytest.approx(0.63e6, abs=5e3)
    layers = [f"encoder.layers.{layer}.{name}" for layer in range(4) for name in ("weight", "bias")]
    gru = [f"context.gru.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert list(network.state_dict()) == ["offset", "gain", *layers, *gru, "predictor.maps.weight"]


def test_the_corpus_level_is_part_of_the_network_and_of_its_weights():
    levelled, plain = build(small(), 1, offset=0.25, gain=3.0), build(small(), 1)
    wave = speechlike(1, 1600)
    for heard, expected in zip(levelled.features(wave), plain.features((wave - 0.25) * 3.0), strict=True):
        torch.testing.assert_close(heard, expected)
    assert {"offset", "gain"} <= set(levelled.state_dict())
    assert not {"offset", "gain"} & {name for name, _ in levelled.named_parameters()}
