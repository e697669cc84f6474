import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.train import optim
from cpcscale.train.optim import OptimConfig, learning_rate, parameter_groups

FALLING = ("cosine", "linear")
peaks = st.floats(1e-6, 1.0)
shares = st.floats(0.0, 1.0)
schedules = st.sampled_from(("constant", *FALLING))


class Small(nn.Module):
    """Parameters of each kind: an encoder's and others', matrices and vectors."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Conv1d(1, 4, 3), nn.GroupNorm(1, 4))
            self.context = nn.GRU(4, 5, batch_first=True)
            self.predictor = nn.Linear(5, 3)

    def forward(self, wave_BS: torch.Tensor) -> torch.Tensor:
        return self.predictor(self.context(self.encoder(wave_BS.unsqueeze(1)).transpose(1, 2))[0])


class Wrapped(nn.Module):
    """A model one level down, beside a scalar that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Small()
        self.log_scale = nn.Parameter(torch.tensor(0.5))


def loss(model: nn.Module, step: int) -> torch.Tensor:
    """A loss of no meaning, another one at each step."""
    wave_BS = torch.randn(2, 20, generator=torch.Generator().manual_seed(step))
    return model(wave_BS).square().mean() * 10


def train(model: nn.Module, optimizer: torch.optim.Optimizer, spec: OptimConfig, steps: range, total: int = 9) -> None:
    """Updates as the training step makes them."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step, total) * group["rate_factor"]
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@given(peaks, st.integers(0, 10**6), st.integers(1, 10**6))
def test_the_paper_rate_is_constant(peak, step, total):
    assert learning_rate(OptimConfig(learning_rate=peak), step, total) == peak


@given(peaks, shares, schedules, st.integers(1, 50), st.integers(1, 100))
def test_warm_up_rises_by_equal_parts_and_its_last_update_is_at_the_peak(peak, share, schedule, warmup, more):
    spec = OptimConfig(learning_rate=peak, warmup_steps=warmup, schedule=schedule, final_share=share)
    rates = [learning_rate(spec, step, warmup + more) for step in range(warmup)]
    assert rates[-1] == peak
    assert rates == pytest.approx([peak * (step + 1) / warmup for step in range(warmup)])


@given(peaks, shares, schedules, st.integers(0, 50), st.integers(1, 100))
def test_after_the_warm_up_the_rate_starts_at_the_peak_and_never_rises(peak, share, schedule, warmup, more):
    spec = OptimConfig(learning_rate=peak, warmup_steps=warmup, schedule=schedule, final_share=share)
    rates = [learning_rate(spec, step, warmup + more) for step in range(warmup, warmup + more + 3)]
    assert rates[0] == peak
    assert all(one >= other for one, other in itertools.pairwise(rates))


@given(peaks, shares, st.sampled_from(FALLING), st.integers(0, 50), st.integers(1, 100), st.integers(0, 100))
def test_a_falling_rate_ends_at_its_share_of_the_peak_and_stays_there(peak, share, schedule, warmup, more, past):
    spec = OptimConfig(learning_rate=peak, warmup_steps=warmup, schedule=schedule, final_share=share)
    end = pytest.approx(share * peak, abs=1e-12 * peak)
    assert learning_rate(spec, warmup + more + past, warmup + more) == end


def test_the_falling_schedules_are_a_line_and_half_a_cosine():
    line = OptimConfig(learning_rate=8.0, warmup_steps=2, schedule="linear", final_share=0.5)
    assert [learning_rate(line, step, 6) for step in range(7)] == pytest.approx([4, 8, 8, 7, 6, 5, 4])
    wave = OptimConfig(learning_rate=8.0, schedule="cosine", final_share=0.5)
    expected = [6 + 2 * math.cos(math.pi * step / 4) for step in range(5)]
    assert [learning_rate(wave, step, 4) for step in range(5)] == pytest.approx(expected)


@given(schedules, st.integers(0, 9), st.permutations(range(12)))
def test_the_rate_of_a_step_does_not_depend_on_the_steps_before_it(schedule, warmup, order):
    spec = OptimConfig(warmup_steps=warmup, schedule=schedule)
    ascending = [learning_rate(spec, step, 12) for step in range(12)]
    assert {step: learning_rate(spec, step, 12) for step in order} == dict(enumerate(ascending))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_a_run_that_goes_on_ends_as_the_one_that_never_stopped(kind):
    spec = OptimConfig(kind=kind, learning_rate=0.01, warmup_steps=2, schedule="cosine", encoder_rate=0.5)
    whole = Small()
    train(whole, optim.build_optimizer(whole, spec), spec, range(9))
    first = Small()
    before = optim.build_optimizer(first, spec)
    train(first, before, spec, range(4))
    second = Small(seed=1)
    second.load_state_dict(first.state_dict())
    after = optim.build_optimizer(second, spec)
    after.load_state_dict(before.state_dict())
    train(second, after, spec, range(4, 9))
    assert torch.equal(weights(second), weights(whole))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"learning_rate": -1.0}, "optim.learning_rate=-1.0 is below 0"),
        ({"weight_decay": -1e-9}, "optim.weight_decay=-1e-09 is below 0"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1 is below 0"),
        ({"clip_norm": -0.5}, "optim.clip_norm=-0.5 is below 0"),
        ({"encoder_rate": -0.1}, "optim.encoder_rate=-0.1 is below 0"),
        ({"final_share": -0.1}, "optim.final_share=-0.1 is below 0"),
        ({"final_share": 1.1}, "optim.final_share=1.1 would end above the peak rate"),
        ({"eps": 0.0}, "optim.eps=0.0 is below"),
        ({"betas": [0.9]}, "must be two numbers"),
        ({"betas": [0.9, 1.0]}, "optim.betas has 1.0"),
        ({"betas": [float("nan"), 0.9]}, "optim.betas has nan"),
        ({"ema_decay": 1.0}, "optim.ema_decay has 1.0"),
        ({"ema_decay": -0.1}, "optim.ema_decay has -0.1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(bad, words):
    with pytest.raises(UserError, match=words):
        OptimConfig(**bad)


@pytest.mark.parametrize("text", ["kind=sgd", "schedule=step", "betas=0.9"])
def test_a_choice_that_there_is_not_is_refused(text):
    with pytest.raises(UserError, match=text.partition("=")[0]):
        config.load(OptimConfig, None, [text])


@pytest.mark.parametrize("encoder_rate", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("decays", [True, False])
def test_every_parameter_is_in_one_group_with_its_own_rate_and_decay(encoder_rate, decays):
    spec = OptimConfig(encoder_rate=encoder_rate, decay_norms_and_biases=decays, weight_decay=0.1)
    for model in (Small(), Wrapped(), build(ModelConfig(), 0)):
        settings = {
            parameter: (group["rate_factor"], group["weight_decay"])
            for group in parameter_groups(model, spec)
            for parameter in group["params"]
        }
        assert sum(len(group["params"]) for group in parameter_groups(model, spec)) == len(settings)
        assert settings == {
            parameter: (
                encoder_rate if name.removeprefix("model.").startswith("encoder.") else 1.0,
                0.1 if decays or parameter.ndim > 1 else 0.0,
            )
            for name, parameter in model.named_parameters()
        }
        assert all(group["lr"] == spec.learning_rate * group["rate_factor"] for group in parameter_groups(model, spec))


def test_by_default_there_is_one_group_in_the_order_of_the_model():
    model = build(ModelConfig(), 0)
    (group,) = parameter_groups(model, OptimConfig())
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]


def test_a_learnt_scalar_is_updated_like_the_rest():
    model = Wrapped()
    optimizer = optim.build_optimizer(model, OptimConfig(learning_rate=0.01))
    (loss(model.model, 0) * model.log_scale).backward()
    optimizer.step()
    assert abs(model.log_scale.item() - 0.5) == pytest.approx(0.01, rel=1e-4)


def test_an_encoder_rate_of_0_freezes_the_encoder_and_nothing_else():
    spec, model, first = OptimConfig(encoder_rate=0.0, kind="adamw"), Small(), Small()
    train(model, optim.build_optimizer(model, spec), spec, range(3))
    for (name, after), before in zip(model.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(after, before) == name.startswith("encoder."), name


PLAIN = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"lr": 2e-4, "weight_decay": 1e-5}),
        ({"betas": [0.8, 0.95], "eps": 1e-3}, {"lr": 2e-4, "weight_decay": 1e-5, "betas": (0.8, 0.95), "eps": 1e-3}),
        ({"learning_rate": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "weight_decay": 0.1}),
    ],
    ids=["the values of the paper", "betas and eps", "rate and decay"],
)
def test_the_optimiser_is_that_of_torch(kind, ours, theirs):
    """Bit for bit torch's fused kernel, and its plain one to the rounding of fp32."""
    models = own, fused, plain = [build(ModelConfig(), 0) for _ in range(3)]
    optimizers = [
        optim.build_optimizer(own, OptimConfig(kind=kind, **ours)),
        PLAIN[kind](fused.parameters(), fused=True, **theirs),
        PLAIN[kind](plain.parameters(), foreach=False, fused=False, **theirs),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = [torch.randn(parameter.shape, generator=generator) for parameter in own.parameters()]
        for model, optimizer in zip(models, optimizers, strict=True):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert torch.equal(weights(own), weights(fused))
    torch.testing.assert_close(weights(own), weights(plain), rtol=2e-7, atol=2e-8)


@pytest.mark.parametrize("fused_first", [True, False])
def test_a_checkpoint_passes_between_the_fused_and_the_plain_kernel(fused_first):
    spec = OptimConfig(learning_rate=0.01)
    model, whole = Small(), Small()
    train(whole, optim.build_optimizer(whole, spec), spec, range(9))
    optimizers = [
        optim.build_optimizer(model, spec),
        torch.optim.Adam(parameter_groups(model, spec), lr=0.01, foreach=False, fused=False),
    ]
    before, after = optimizers if fused_first else optimizers[::-1]
    train(model, before, spec, range(4))
    state = {
        number: {name: tensor.cpu().clone() for name, tensor in entries.items()}
        for number, entries in before.state_dict()["state"].items()
    }
    after.load_state_dict({"state": state, "param_groups": after.state_dict()["param_groups"]})
    train(model, after, spec, range(4, 9))
    torch.testing.assert_close(weights(model), weights(whole), rtol=1e-5, atol=1e-6)


def test_scaled_gradients_that_are_unscaled_for_clipping_are_not_unscaled_again():
    """The fused kernel can unscale by itself. A large eps, because Adam hardly feels a factor of its gradients."""
    spec = OptimConfig(learning_rate=0.01, eps=0.1)
    scaled, plain = Small(), Small()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [optim.build_optimizer(model, spec) for model in (scaled, plain)]
    for step in range(4):
        scaler.scale(loss(scaled, step)).backward()
        scaler.unscale_(optimizers[0])
        loss(plain, step).backward()
        for model in (scaled, plain):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    torch.testing.assert_close(weights(scaled), weights(plain), rtol=1e-6, atol=1e-7)
