import dataclasses
import itertools
import math

import batches
import pytest
import speech
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cpcscale.bench import plain_network
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, build
from cpcscale.objective.infonce import InfoNCE, ScoredRows, count_predictions
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.scores import ObjectiveSums, reduce_scores
from cpcscale.train.step import TrainStep

ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def step_of(recipe: Recipe) -> TrainStep:
    return TrainStep(build(recipe.model, recipe.seed, gain=10.0), recipe, ALONE, total=100)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def weights(model: CPC) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


AUGMENTED = {"augment__past": True, "augment__noise_p": 0.9, "augment__reverb_p": 0.9, "augment__band_drop_p": 0.9}


ACOUSTIC = {"objective__acoustic__frames": 0.5, "objective__acoustic__window": 0.5}
ALL = ACOUSTIC | {"objective__pooled__weight": 0.2, "objective__scope": "mixed", "objective__draw": "shared"}
PLAIN = ({}, AUGMENTED, AUGMENTED | {"objective__scope": "batch"})


@pytest.mark.parametrize(
    ("micro_batch", "keys"), [*itertools.product((1, 2, 3, 5, 8, 100), PLAIN), (3, ACOUSTIC), (3, ALL), (1, ALL)]
)
def test_loss_and_gradient_do_not_depend_on_micro_batches(micro_batch, keys):
    """To 1e-5 of the largest gradient of each parameter: fp32 sums in another order."""
    whole, split = step_of(speech.recipe(**keys)), step_of(speech.recipe(train__micro_batch=micro_batch, **keys))
    made = batches.made if keys in PLAIN else batches.made_measured
    one, other = (step(made(), 0) for step in (whole, split))
    for part, expected in zip(other.parts, one.parts, strict=True):
        torch.testing.assert_close(part.sums_MN, expected.sums_MN, rtol=1e-5, atol=0)
        assert part.count_N.tolist() == expected.count_N.tolist()
    expected = gradients(whole.contrast)
    for name, gradient in gradients(split.contrast).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * expected[name].abs().max().item())


def test_the_gradient_is_that_of_the_mean_over_k_of_the_mean_over_valid_predictions():
    step, batch = step_of(speech.recipe()), batches.made()
    result = step(batch, 0)
    twin = build(step.recipe.model, step.recipe.seed, gain=10.0)
    frames_B = torch.from_numpy(batch.samples_B // 160)
    z_BTC, c_BTD = twin.features(torch.from_numpy(batch.wave_BS).float() / 32768)
    rows = ScoredRows(z_BTC, twin.predictor(c_BTD), torch.tensor(1.0), frames_B, torch.from_numpy(batch.key_B))
    loss = (plain_network.loss_K(rows, step.recipe.objective) / count_predictions(frames_B, 4)).mean()
    loss.backward()
    assert reduce_scores(result.parts, ALONE)["loss"] == pytest.approx(loss.item(), rel=1e-6)
    expected = gradients(twin)
    for name, gradient in gradients(step.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_padding_and_bad_rows_change_nothing_but_the_count_of_bad_windows():
    whole, without = step_of(speech.recipe()), step_of(speech.recipe())
    batch = batches.made()
    real = batch.samples_B > 0
    rows = {name: getattr(batch, name)[real] for name in ("wave_BS", "samples_B", "key_B", "utterance_B", "number_B")}
    shorter = dataclasses.replace(batch, **rows, bad=())
    one, other = whole(batch, 0), without(shorter, 0)
    for part, expected in zip(one.parts, other.parts, strict=True):
        torch.testing.assert_close(part.sums_MN, expected.sums_MN, rtol=1e-5, atol=0)
        assert part.count_N.tolist() == expected.count_N.tolist()
    assert (one.samples, one.bad) == (sum(batches.LENGTHS), 1)
    assert (other.samples, other.bad) == (sum(batches.LENGTHS), 0)


def test_a_batch_without_a_valid_prediction_is_a_skipped_update():
    step = step_of(speech.recipe())
    before = weights(step.model)
    result = step(batches.made(lengths=(0,) * 8), 0)
    assert result.empty
    assert step.faults() == (0, 0)
    assert same(before, weights(step.model))
    assert reduce_scores(result.parts, ALONE)["loss"] == 0


def test_a_gradient_that_is_not_finite_skips_the_update_and_leaves_weights_and_optimiser_as_they_were():
    step = step_of(speech.recipe())
    step(batches.made(), 0)
    before, moments = weights(step.model), step.optimizer.state_dict()["state"]
    moments = {number: {key: value.clone() for key, value in entry.items()} for number, entry in moments.items()}
    hook = step.model.predictor.maps.weight.register_hook(lambda gradient: gradient * math.inf)
    step(batches.made(), 1)
    assert step.faults() == (1, 1)
    assert same(before, weights(step.model))
    after = step.optimizer.state_dict()["state"]
    assert all(torch.equal(after[n][key], value) for n, entry in moments.items() for key, value in entry.items())
    hook.remove()
    step(batches.made(), 2)
    assert step.faults() == (0, 0)
    assert not same(before, weights(step.model))


class _Waits(TorchDispatchMode):
    """The operations whose result the host reads, for which it would have to wait for a GPU."""

    READ = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in function.name() for name in self.READ):
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batch", [0, 3])
@pytest.mark.parametrize("draw", ["each", "shared"])
@pytest.mark.parametrize("scope", ["utterance", "group", "batch", "mixed"])
def test_no_value_of_the_device_is_read_in_an_update_that_is_not_scored(scope, draw, micro_batch):
    keys = ALL | {"objective__scope": scope, "objective__draw": draw, "train__micro_batch": micro_batch}
    step = step_of(speech.recipe(optim__clip_norm=1.0, **keys))
    step(batches.made_measured(), 0)
    with _Waits() as waits:
        step(batches.made_measured(), 1, scored=False)
    assert not waits.found
    with _Waits() as waits:
        bool(torch.ones(1).isfinite())
    assert waits.found, "the probe sees nothing"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("keys", [{}, AUGMENTED, {"objective__scope": "batch"}, ALL])
def test_an_update_on_a_gpu_waits_for_nothing(precision, keys):
    recipe = speech.recipe(train__precision=precision, **keys)
    ranks = Ranks(0, 1, 1, torch.device("cuda", 0))
    step = TrainStep(build(recipe.model, recipe.seed, gain=10.0).to(ranks.device), recipe, ranks, total=100)
    for t in range(2):
        step(batches.made_measured(), t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batches.made_measured(), 2, scored=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.faults()[1] == 0


def test_bf16_stays_finite_and_near_single_precision():
    losses = {}
    for precision in ("fp32", "bf16"):
        step = step_of(speech.recipe(train__precision=precision))
        losses[precision] = [reduce_scores(step(batches.made(), t).parts, ALONE)["loss"] for t in range(3)]
        assert all(tensor.isfinite().all() for tensor in weights(step.model).values())
        assert all(parameter.dtype == torch.float32 for parameter in step.model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_fp16_without_a_gpu_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"fp16 needs a GPU.*use fp32") as refusal:
        step_of(speech.recipe(train__precision="fp16"))
    assert "\n" not in str(refusal.value)


def test_gradients_are_clipped_to_the_norm_asked_for():
    free, clipped = step_of(speech.recipe()), step_of(speech.recipe(optim__clip_norm=1e-3))
    for step in (free, clipped):
        step(batches.made(), 0)
    norms = [torch.stack([g.norm() for g in gradients(step.model).values()]).norm().item() for step in (free, clipped)]
    assert norms[0] > 1e-3
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_every_update_uses_the_rate_of_its_step():
    step = step_of(speech.recipe(optim__warmup_steps=4, optim__learning_rate=0.4))
    for t, rate in ((0, 0.1), (2, 0.3), (3, 0.4), (50, 0.4)):
        step(batches.made(), t)
        assert step.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_evaluation_gives_the_same_sums_and_changes_nothing():
    step = step_of(speech.recipe())
    before = weights(step.model)
    evaluated = step.evaluate(batches.made())
    assert same(before, weights(step.model))
    assert all(parameter.grad is None for parameter in step.model.parameters())
    trained = step(batches.made(), 0)
    for one, other in zip(evaluated, trained.parts, strict=True):
        torch.testing.assert_close(one.sums_MN, other.sums_MN, rtol=1e-6, atol=0)
        assert one.count_N.tolist() == other.count_N.tolist()


def test_augmentation_changes_what_contexts_hear_and_nothing_that_is_scored_held_out():
    plainly, quiet, loud = (
        step_of(speech.recipe(**keys))
        for keys in ({}, dict.fromkeys(AUGMENTED, 0) | {"augment__past": True, "augment__time_drop_p": 0}, AUGMENTED)
    )
    heard = [step.evaluate(batches.made())[0].sums_MN[0] for step in (plainly, loud)]
    torch.testing.assert_close(heard[0], heard[1], rtol=0, atol=0)
    one, same, other = (step(batches.made(), 0).parts[0].sums_MN[0] for step in (plainly, quiet, loud))
    torch.testing.assert_close(one, same)
    assert not torch.allclose(one, other)


def test_scores_are_means_over_k_of_means_over_predictions():
    sums_MK = torch.tensor([[8.0, 2.0], [4, 0], [2.0, 0.5]], dtype=torch.float64)
    part = ObjectiveSums(InfoNCE(speech.recipe().objective, 2), sums_MK, torch.tensor([8, 1]))
    assert reduce_scores([part], ALONE) == {
        "loss": 1.5,
        "accuracy_mean": 0.25,
        "false_negative_rate": 0.375,
        "loss_k01": 1.0,
        "loss_k02": 2.0,
        "accuracy_k01": 0.5,
        "accuracy_k02": 0.0,
    }
