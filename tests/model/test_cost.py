import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cpcscale import config
from cpcscale.model.cost import CostByPart, NetworkCost, network_cost
from cpcscale.model.cpc import CPC, ModelConfig, build

HOP, FRAMES = 160, 40
SIZES = {"paper": (1.02, 0.626), "small": (3.95, 2.37), "base": (30.7, 24.4), "large": (103, 90.7)}
CHANGES = {
    "paper": [],
    "lstm": ["size=small"],
    "deep gru": ["context.layers=3", "encoder.norm=group"],
    "transformers": ["size=base", "context.layers=2"],
    "relative": ["size=base", "context.layers=2", "context.positions=relative", "predictor.positions=relative"],
    "each": ["predictor.kind=each", "predictor.steps=3", "encoder.norm=channel"],
    "log mel": ["encoder.kind=logmel"],
    "few bands": ["encoder.kind=logmel", "encoder.bands=20", "encoder.kernels=[3,4]", "encoder.strides=[1,2]"],
    "odd hop": ["encoder.kernels=[7,5,6]", "encoder.strides=[4,5,3]"],
}


def model(*changes: str) -> ModelConfig:
    return config.load(ModelConfig, None, [*changes])


def modules(network: CPC) -> list[nn.Module]:
    return [network.encoder, network.context, network.predictor]


def values(parts: CostByPart) -> list[float]:
    return [parts.encoder, parts.context, parts.predictor]


@pytest.fixture(params=CHANGES)
def changed(request) -> ModelConfig:
    return model(*CHANGES[request.param])


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_built_network(size):
    found = network_cost(model(f"size={size}"), 10 * HOP, 1).parameters
    network = build(model(f"size={size}"), 0)
    assert values(found) == [sum(weight.numel() for weight in part.parameters()) for part in modules(network)]
    assert found.total == sum(weight.numel() for weight in network.parameters())
    total, kept = SIZES[size]
    assert (found.total / 1e6, found.kept / 1e6) == (pytest.approx(total, rel=5e-3), pytest.approx(kept, rel=5e-3))


def product(total: torch.Size, left: torch.Size, right: torch.Size, **ignored: object) -> int:
    """Of addmm_, which torch's counter leaves out."""
    return 2 * left[0] * left[1] * right[1]


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """torch's own counter, which sees neither the CPU's fused LSTM nor its fused attention: both are off here."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})
    with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), counter:
        yield counter


def counted(part: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    with counting() as counter:
        out = part(x)
    return counter.get_total_flops(), out


def test_operations_are_those_that_torch_counts(changed):
    network = build(changed, 0)
    found = network_cost(changed, FRAMES * network.hop_samples, 1)
    seconds = FRAMES / found.frames_per_s
    encoder, z_BTC = counted(network.encoder, torch.randn(1, FRAMES * network.hop_samples))
    context, c_BTD = counted(network.context, z_BTC)
    predictor, _ = counted(network.predictor, c_BTD)
    # But for the zeros before the first frame, which nothing is multiplied with.
    expected = [part * seconds for part in values(found.flops_per_s)]
    assert [encoder, context, predictor] == pytest.approx(expected, rel=0.02)


def test_training_costs_three_forward_passes(changed):
    network = build(changed, 0)
    wave = torch.randn(1, FRAMES * network.hop_samples)
    found = network_cost(changed, wave.shape[1], 1)
    with counting() as step:
        network.predictor(network.features(wave)[1]).sum().backward()
    # But for the first convolution, whose input needs no gradient.
    per_s = step.get_total_flops() * found.frames_per_s / FRAMES
    assert per_s == pytest.approx(3 * found.flops_per_s.total, rel=0.05)


def test_attention_costs_more_a_second_in_longer_windows():
    transformer, gru = model("size=base"), model()
    long, short = (
        network_cost(transformer, 1000 * HOP, 1).flops_per_s,
        network_cost(transformer, 100 * HOP, 1).flops_per_s,
    )
    assert long.context - short.context == pytest.approx(100 * 6 * 4 * 900 * 512)
    assert long.encoder == short.encoder
    assert network_cost(gru, 1000 * HOP, 1).flops_per_s == network_cost(gru, 100 * HOP, 1).flops_per_s


@pytest.mark.parametrize(
    "changes",
    [
        ("encoder.channels=64",),
        ("encoder.channels=64", "encoder.kernels=[10,8,4,4,4]", "encoder.strides=[5,4,2,2,2]"),
        ("encoder.channels=64", "encoder.kernels=[3,9]", "encoder.strides=[2,8]", "encoder.norm=channel"),
        ("encoder.channels=64", "encoder.kernels=[5,4]", "encoder.strides=[5,4]"),
        ("encoder.kind=logmel",),
        ("encoder.kind=logmel", "encoder.kernels=[3,4]", "encoder.strides=[1,2]"),
    ],
)
def test_the_receptive_field_is_what_the_gradient_of_a_frame_reaches(changes):
    spec = model(*changes)
    network = build(spec, 0)
    wave = torch.randn(1, 8 * network.hop_samples, requires_grad=True)
    network.features(wave)[0][0, 6].sum().backward()
    reached = wave.grad[0].nonzero().flatten()
    samples = int(reached.max() - reached.min()) + 1
    assert samples == spec.encoder.receptive_samples
    found = network_cost(spec, 8 * network.hop_samples, 1)
    assert found.receptive_ms == samples / 16
    assert found.frames_per_s == 16_000 / network.hop_samples


def test_the_papers_frames_hear_26_ms_100_times_a_second():
    found = network_cost(model(), 160_000, 8)
    assert (found.frames_per_s, found.receptive_ms) == (100, 425 / 16)
    assert found.flops_per_s.total == pytest.approx(0.42e9, rel=5e-3)


def held_bytes(network: CPC, wave: Tensor) -> int:
    """Weights, gradients, two moments, and what torch keeps for the backward pass."""
    own = {weight.untyped_storage().data_ptr() for weight in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Held on to, so that no address serves twice.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.predictor(network.features(wave)[1])
    activations = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    return 16 * sum(weight.numel() for weight in network.parameters()) + activations


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        *CHANGES.values(),
        # What an encoder of 8 channels keeps is little beside the context and the predictor.
        ["encoder.channels=8", "context.layers=4"],
        ["encoder.channels=8", "context.kind=lstm"],
        ["encoder.channels=8", "context.kind=transformer", "context.layers=4"],
        ["encoder.channels=8", "context.kind=transformer", "context.layers=4", "context.positions=relative"],
        ["encoder.channels=8", "predictor.kind=each", "predictor.positions=relative"],
    ],
)
def test_memory_is_near_what_torch_keeps(changes, rows):
    spec = model(*changes)
    network = build(spec, 0)
    samples = 2 * FRAMES * network.hop_samples
    found = network_cost(spec, samples, rows)
    real = held_bytes(network, torch.randn(rows, samples)) / 2**20
    weights = 16 * found.parameters.total / 2**20
    assert found.memory_mib - weights == pytest.approx(real - weights, rel=0.1)


def test_facts_of_a_large_network_take_no_memory_and_draw_nothing():
    before = torch.get_rng_state()
    assert isinstance(network_cost(model("size=large"), 160_000, 64), NetworkCost)
    assert torch.equal(before, torch.get_rng_state())
