import numpy as np
import pytest
import torch

from cpcscale.emotion.fit import (
    DivergedError,
    Examples,
    Fit,
    FitConfig,
    batches,
    by_length,
    collate,
    device,
    predict,
    seeded,
)
from cpcscale.emotion.recogniser import EndToEnd, Recogniser, RecogniserConfig
from cpcscale.errors import UserError
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig
from cpcscale.objective.ccc import ccc_loss

CPU = torch.device("cpu")
WIDTH = 5
QUICK = FitConfig(epochs=3, batch=8, learning_rate=3e-3, device="cpu")


def examples(count: int, seed: int) -> Examples:
    """Utterances whose features hold the labels: two as a level, the third as a spread over time."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(-1, 1, (count, 3))
    inputs = []
    for row in truth:
        x_TC = rng.normal(0, 1, (int(rng.integers(5, 30)), WIDTH)).astype(np.float32)
        x_TC[:, :2] += 2 * row[:2]
        x_TC[:, 2] *= 2 + row[2]
        inputs.append(x_TC)
    return Examples(inputs, truth)


def head(seed: int = 0) -> Recogniser:
    with seeded(seed, "head"):
        return Recogniser(RecogniserConfig(heads=2, hidden=16, dense=16), WIDTH)


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_labels_that_are_in_the_features_are_learnt_and_carry_over_to_new_utterances():
    settings = FitConfig(epochs=25, batch=16, learning_rate=3e-3, device="cpu")
    fit = Fit(head(), examples(120, 0), examples(60, 1), settings, seed=0)
    curve = list(fit)
    assert curve[-1].train_loss < curve[0].train_loss
    assert fit.best is not None and fit.best.dev_ccc > 0.8


def test_the_best_epoch_is_kept_and_is_not_a_live_reference():
    fit = Fit(
        head(), examples(40, 0), examples(20, 1), FitConfig(epochs=6, batch=8, learning_rate=0.05, device="cpu"), seed=0
    )
    after = {epoch.epoch: (epoch.dev_ccc, weights(fit.network)) for epoch in fit}
    best = max(after, key=lambda number: after[number][0])
    last = max(after)
    assert best != last, "choose settings under which the last epoch is not the best"
    assert not same(after[best][1], after[last][1])
    assert same(weights(fit.finish()), after[best][1])
    assert fit.best is not None and (fit.best.epoch, fit.best.dev_ccc) == (best, after[best][0])
    dev = examples(20, 1)
    guess = predict(fit.finish(), dev.inputs, CPU)
    np.testing.assert_array_equal(guess, predict(fit.network, dev.inputs, CPU))


def test_the_same_seed_gives_the_same_curve_and_weights_and_another_seed_does_not():
    def run(seed: int) -> tuple[list, dict[str, torch.Tensor]]:
        torch.manual_seed(int(np.random.default_rng().integers(1 << 30)))  # the global state must not matter
        fit = Fit(head(), examples(30, 0), examples(20, 1), QUICK, seed=seed)
        return list(fit), weights(fit.finish())

    (first, first_weights), (again, again_weights), (other, _) = run(0), run(0), run(1)
    assert first == again and same(first_weights, again_weights)
    assert first != other


def test_fits_that_take_turns_do_not_touch_each_other():
    alone = [list(Fit(head(seed), examples(30, 0), examples(20, 1), QUICK, seed=seed)) for seed in (0, 1)]
    fits = [Fit(head(seed), examples(30, 0), examples(20, 1), QUICK, seed=seed) for seed in (0, 1)]
    turns = list(zip(*fits, strict=True))
    assert [list(curve) for curve in zip(*turns, strict=True)] == alone


def test_the_global_generator_is_left_as_it_was():
    state = torch.random.get_rng_state()
    list(Fit(head(), examples(30, 0), examples(20, 1), QUICK, seed=0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_patience_stops_after_so_many_epochs_without_a_better_one():
    settings = FitConfig(epochs=50, batch=8, learning_rate=0.0, weight_decay=0.0, patience=2, device="cpu")
    fit = Fit(head(), examples(30, 0), examples(20, 1), settings, seed=0)
    assert [epoch.epoch for epoch in fit] == [1, 2, 3]
    assert fit.best is not None and fit.best.epoch == 1


def test_every_row_is_in_one_batch_and_batches_are_even():
    parts = batches(33, 16, seed=0, epoch=1)
    assert sorted(np.concatenate(parts)) == list(range(33))
    assert [len(part) for part in parts] == [11, 11, 11]
    assert not np.array_equal(parts[0], batches(33, 16, seed=0, epoch=2)[0])


def test_groups_of_like_length_give_the_gradient_of_one_padded_batch():
    network, data = head().double().eval(), examples(21, 0)
    weights, truth_BP = (0.2, 0.5, 0.3), torch.from_numpy(data.truth_UP)
    gradients = []
    for guess in (lambda: by_length(network, data.inputs, CPU), lambda: network(*collate(data.inputs, CPU))):
        network.zero_grad()
        ccc_loss(guess(), truth_BP, weights).backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for grouped, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(grouped, padded, atol=1e-12, rtol=1e-9)


def test_waveforms_are_scaled_to_floats_and_padded_to_one_of_few_lengths():
    x_BS, samples_B = collate([np.array([16384, -32768], np.int16), np.array([1], np.int16)], CPU)
    assert x_BS[:, :2].tolist() == [[0.5, -1.0], [1 / 32768, 0.0]] and samples_B.tolist() == [2, 1]
    assert (x_BS[:, 2:] == 0).all()
    lengths = {collate([np.ones(count, np.int16)], CPU)[0].shape[1] for count in range(1, 24_000, 111)}
    assert lengths == {8_000, 16_000, 24_000}


def test_an_encoder_is_trained_with_a_rate_of_its_own():
    model = ModelConfig(encoder=EncoderConfig(channels=4), context=ContextConfig(width=WIDTH))
    rng = np.random.default_rng(0)
    waves = [rng.integers(-3000, 3000, int(rng.integers(800, 2400))).astype(np.int16) for _ in range(12)]
    data = Examples(waves, rng.uniform(-1, 1, (12, 3)))
    moved = {}
    for rate in (0.0, 1e-3):
        network = EndToEnd(build(model, seed=0), head())
        before = weights(network)
        list(Fit(network, data, data, QUICK, seed=0, encoder_rate=rate))
        after = weights(network)
        moved[rate] = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("encoder.") for name in moved[0.0])
    assert "encoder.encoder.layers.0.weight" in moved[1e-3] and "encoder.context.gru.weight_hh_l0" in moved[1e-3]
    assert "recogniser.mix.weight" in moved[0.0]


def test_a_loss_that_is_not_finite_stops_with_the_way_out():
    bad = examples(10, 0)
    bad.inputs[3][0, 0] = np.inf
    with pytest.raises(DivergedError, match=r"lower fit\.learning_rate"):
        list(Fit(head(), bad, examples(5, 1), QUICK, seed=0))


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="add up to more than 1"):
        FitConfig(activation_weight=0.7, valence_weight=0.7)
    with pytest.raises(UserError, match=r"fit\.batch=1"):
        FitConfig(batch=1)
    assert sum(FitConfig(activation_weight=0.2, valence_weight=0.5).weights) == pytest.approx(1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            device(FitConfig(device="cuda"))
