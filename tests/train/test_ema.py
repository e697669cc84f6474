import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cpcscale.model.cpc import ModelConfig, build
from cpcscale.train.ema import Ema


class Steered(nn.Module):
    """A model whose weight and buffer a test sets; bit patterns that arithmetic would not keep are in it too."""

    marks: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.register_buffer("marks", torch.tensor([0, -0.0, float("nan"), float("inf")]))
        self.register_buffer("count", torch.tensor(0))

    def become(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
        self.count += 1


def followed(values: list[float], decay: float) -> tuple[Steered, Ema]:
    """A model that had these weights after each of its updates, and its mean."""
    model = Steered()
    ema = Ema(model, decay)
    for value in values:
        model.become(value)
        ema.update()
    return model, ema


def mean(ema: Ema) -> float:
    return ema.state()["module.weight"][0].item()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


decays = st.floats(0.0, 0.99999)
runs = st.lists(st.floats(-10, 10), min_size=1, max_size=30)


@given(runs, decays)
def test_the_mean_follows_its_definition(values, decay):
    expected = values[0]
    for t, value in enumerate(values[1:], start=1):
        kept = min(decay, (1 + t) / (10 + t))
        expected = kept * expected + (1 - kept) * value
    assert mean(followed(values, decay)[1]) == pytest.approx(expected, abs=1e-12)


@given(runs, decays)
def test_the_mean_lies_within_the_weights_it_has_seen(values, decay):
    assert min(values) - 1e-9 <= mean(followed(values, decay)[1]) <= max(values) + 1e-9


@given(st.floats(-10, 10), st.integers(1, 20), decays)
def test_weights_that_stay_are_their_own_mean(value, updates, decay):
    assert mean(followed([value] * updates, decay)[1]) == pytest.approx(value, abs=1e-12)


@given(runs, runs, decays)
def test_a_mean_that_goes_on_from_its_state_is_the_one_that_never_stopped(before, after, decay):
    _, whole = followed(before + after, decay)
    _, first = followed(before, decay)
    model = Steered()
    second = Ema(model, decay)
    second.load(first.state())
    for value in after:
        model.become(value)
        second.update()
    assert mean(second) == mean(whole)


def test_buffers_are_those_of_the_last_update():
    model, ema = followed([1.0, 2.0, 3.0], 0.9)
    model.become(4.0)
    with ema.applied():
        assert model.count == 3
    assert model.count == 4


def test_within_the_block_the_model_has_the_mean():
    model, ema = followed([1.0, 5.0, 7.0], 0.9)
    with ema.applied():
        assert model.weight[0].item() == mean(ema)
    assert model.weight[0].item() == 7.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_weights_come_back_bit_for_bit_also_when_the_block_fails(error):
    model, ema = followed([1.0, 5.0], 0.9)
    model.become(-0.0)
    before, tensors = bits(model), [id(tensor) for tensor in model.parameters()]
    state = ema.state()["module.weight"].clone()
    with ema.applied():
        pass
    assert bits(model) == before
    with pytest.raises(error), ema.applied():
        model.become(3.0)
        raise error
    assert bits(model) == before
    assert [id(tensor) for tensor in model.parameters()] == tensors
    assert torch.equal(ema.state()["module.weight"], state)


def test_training_goes_on_after_the_block_as_if_there_had_been_none():
    wave_BS = torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))
    ended = []
    for looks in (False, True):
        model = build(ModelConfig(), 0)
        ema, optimizer = Ema(model, 0.99), torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model.features(wave_BS)[1].square().mean().backward()
            optimizer.step()
            ema.update()
            if looks:
                with ema.applied(), torch.no_grad():
                    model.features(wave_BS)
        ended.append(bits(model) | {f"mean of {name}": value.numpy().tobytes() for name, value in ema.state().items()})
    assert ended[0] == ended[1]
