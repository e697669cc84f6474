from itertools import pairwise

import numpy as np
import pytest
import torch

from cpcscale.emotion.batching import batches, by_length, collate, predict, seeded
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead
from cpcscale.emotion.heads.training import (
    DivergedError,
    FitAugmentConfig,
    FitConfig,
    HeadTraining,
    TrainingExamples,
    device,
)
from cpcscale.errors import UserError
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig
from cpcscale.objective.ccc import ccc_loss

CPU = torch.device("cpu")
WIDTH = 5
QUICK = FitConfig(epochs=3, batch=8, learning_rate=3e-3, device="cpu")


def examples(count: int, seed: int) -> TrainingExamples:
    """Utterances whose features hold the labels: two as a level, the third as a spread over time."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(-1, 1, (count, 3))
    inputs = []
    for row in truth:
        x_TC = rng.normal(0, 1, (int(rng.integers(5, 30)), WIDTH)).astype(np.float32)
        x_TC[:, :2] += 2 * row[:2]
        x_TC[:, 2] *= 2 + row[2]
        inputs.append(x_TC)
    return TrainingExamples(inputs, truth)


def head(seed: int = 0) -> AttentionHead:
    with seeded(seed, "head"):
        return AttentionHead(AttentionHeadConfig(heads=2, hidden=16, dense=16), WIDTH)


def end_to_end() -> EncoderWithHead:
    model = ModelConfig(encoder=EncoderConfig(channels=4), context=ContextConfig(width=WIDTH))
    return EncoderWithHead(build(model, seed=0), head())


def waves(count: int, seed: int = 0) -> TrainingExamples:
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(-3000, 3000, int(rng.integers(800, 2400))).astype(np.int16) for _ in range(count)]
    return TrainingExamples(inputs, rng.uniform(-1, 1, (count, 3)))


def in_double(network: EncoderWithHead) -> EncoderWithHead:
    """The network and what it is given, in float64."""
    network.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(), *inputs[1:]))
    return network.double()


def update(network: torch.nn.Module, data: TrainingExamples, **settings) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of one update whose batch is all of `data`."""
    config = FitConfig(epochs=1, batch=len(data.inputs), device="cpu", **settings)
    (epoch,) = HeadTraining(network, data, data, config, seed=0)
    assert epoch.updates == 1
    return epoch.train_loss, {name: each.grad for name, each in network.named_parameters() if each.grad is not None}


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of any gradient, as a share of the largest value of all."""
    assert left.keys() == right.keys()
    largest = max(float(tensor.abs().max()) for tensor in left.values())
    return max(float((left[name] - right[name]).abs().max()) for name in left) / largest


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_labels_that_are_in_the_features_are_learnt_and_carry_over_to_new_utterances():
    settings = FitConfig(epochs=25, batch=16, learning_rate=3e-3, device="cpu")
    fit = HeadTraining(head(), examples(120, 0), examples(60, 1), settings, seed=0)
    curve = list(fit)
    assert curve[-1].train_loss < curve[0].train_loss
    assert fit.best is not None and fit.best.dev_ccc > 0.8


def test_the_best_epoch_is_kept_and_is_not_a_live_reference():
    fit = HeadTraining(
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
        fit = HeadTraining(head(), examples(30, 0), examples(20, 1), QUICK, seed=seed)
        return list(fit), weights(fit.finish())

    (first, first_weights), (again, again_weights), (other, _) = run(0), run(0), run(1)
    assert first == again and same(first_weights, again_weights)
    assert first != other


def test_fits_that_take_turns_do_not_touch_each_other():
    alone = [list(HeadTraining(head(seed), examples(30, 0), examples(20, 1), QUICK, seed=seed)) for seed in (0, 1)]
    fits = [HeadTraining(head(seed), examples(30, 0), examples(20, 1), QUICK, seed=seed) for seed in (0, 1)]
    turns = list(zip(*fits, strict=True))
    assert [list(curve) for curve in zip(*turns, strict=True)] == alone


def test_the_global_generator_is_left_as_it_was():
    state = torch.random.get_rng_state()
    list(HeadTraining(head(), examples(30, 0), examples(20, 1), QUICK, seed=0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_patience_stops_after_so_many_epochs_without_a_better_one():
    settings = FitConfig(epochs=50, batch=8, learning_rate=0.0, weight_decay=0.0, patience=2, device="cpu")
    fit = HeadTraining(head(), examples(30, 0), examples(20, 1), settings, seed=0)
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


@pytest.mark.parametrize("micro_batch", [1, 5, 8, 16])
def test_32_utterances_in_micro_batches_have_loss_and_gradient_of_one_batch_with_dropout_on(micro_batch):
    """4 x 8 and others against 1 x 32: to 1e-12 of the largest gradient in float64, to 1e-5 in float32."""
    data = examples(32, 0)
    for make, tolerance in ((lambda: head().double(), 1e-12), (head, 1e-5)):
        loss, whole = update(make(), data)
        split_loss, split = update(make(), data, micro_batch=micro_batch)
        assert split_loss == pytest.approx(loss, abs=tolerance)
        assert furthest(whole, split) < tolerance


def test_dropout_is_on_where_gradients_are_compared():
    data = examples(32, 0)
    still = AttentionHead(AttentionHeadConfig(heads=2, hidden=16, dense=16, dropout=0.0), WIDTH)
    still.load_state_dict(head().state_dict())
    assert furthest(update(still, data)[1], update(head(), data)[1]) > 0.1


def test_the_gradient_of_an_encoder_in_micro_batches_is_that_of_one_batch():
    data = waves(12)
    loss, whole = update(in_double(end_to_end()), data)
    split_loss, split = update(in_double(end_to_end()), data, micro_batch=5)
    assert any(name.startswith("encoder.") for name in whole)
    assert split_loss == pytest.approx(loss, abs=1e-12)
    assert furthest(whole, split) < 1e-12


def test_the_gradient_of_augmented_audio_in_micro_batches_is_that_of_one_batch():
    data, augment = waves(12), FitAugmentConfig(enabled=True)
    loss, whole = update(in_double(end_to_end()), data, augment=augment)
    split_loss, split = update(in_double(end_to_end()), data, micro_batch=5, augment=augment)
    assert furthest(whole, update(in_double(end_to_end()), data)[1]) > 0.01
    assert split_loss == pytest.approx(loss, abs=1e-12)
    assert furthest(whole, split) < 1e-12


def test_the_mean_over_micro_batches_of_their_ccc_has_another_gradient():
    data = examples(32, 0)
    network, parts = head().double().eval(), np.split(np.argsort(data.truth_UP[:, 0]), 4)
    gradients = []
    for rows in ([np.arange(32)], parts):
        network.zero_grad()
        for part in rows:
            guess_BP = by_length(network, [data.inputs[row] for row in part], CPU)
            (ccc_loss(guess_BP, torch.from_numpy(data.truth_UP[part]), (1 / 3, 1 / 3, 1 / 3)) / len(rows)).backward()
        gradients.append({name: each.grad.clone() for name, each in network.named_parameters()})
    assert furthest(*gradients) > 0.1


def test_all_at_once_is_one_pass_and_micro_batches_are_two_with_no_larger_graph():
    for micro_batch, expected in ((0, [(True, 32)]), (32, [(True, 32)]), (8, [(False, 8)] * 4 + [(True, 8)] * 4)):
        network, passes = head(), []
        network.register_forward_pre_hook(
            lambda module, inputs, passes=passes: (
                passes.append((torch.is_grad_enabled(), len(inputs[0]))) if module.training else None
            )
        )
        update(network, examples(32, 0), micro_batch=micro_batch)
        assert passes == expected


def test_dropout_of_an_encoders_own_is_the_same_in_both_passes():
    class Dropping(AttentionHead):
        def forward(self, x_BTC, frames_B, key_B=None):
            return super().forward(torch.nn.functional.dropout(x_BTC, 0.3, self.training), frames_B, key_B)

    # Groups of 8 at once, in one pass and in micro-batches: torch's own dropout follows the groups.
    rng = np.random.default_rng(0)
    data = TrainingExamples(
        [rng.normal(0, 1, (250, WIDTH)).astype(np.float32) for _ in range(32)], examples(32, 0).truth_UP
    )
    networks = [Dropping(AttentionHeadConfig(heads=2, hidden=16, dense=16), WIDTH).double() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    loss, whole = update(networks[0], data)
    split_loss, split = update(networks[1], data, micro_batch=8)
    assert split_loss == pytest.approx(loss, abs=1e-12)
    assert furthest(whole, split) < 1e-12


def test_what_is_random_about_an_utterance_goes_with_its_id_and_not_with_its_place():
    data = examples(12, 0)
    ids = [f"u{number}" for number in range(12)]
    turned = [TrainingExamples(data.inputs[::-1], data.truth_UP[::-1].copy(), names) for names in (ids[::-1], ids)]
    _, first = update(head().double(), TrainingExamples(data.inputs, data.truth_UP, ids))
    _, again = update(head().double(), turned[0])
    _, other = update(head().double(), turned[1])
    assert furthest(first, again) < 1e-12
    assert furthest(first, other) > 0.01


class Levels(torch.nn.Module):
    """Says the mean of the first feature three times, and notes what it is given in training."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.heard: list[list[float]] = []

    def forward(self, x_BTC, frames_B, key_B=None):
        level_B1 = x_BTC[:, :, :1].sum(dim=1) / frames_B[:, None]
        if self.training:
            self.heard.append(level_B1[:, 0].tolist())
        return level_B1 * self.scale


def windowed() -> list:
    """Levels 1, 2 and the like: one window bare, one in a tuple, three windows of 10, 20 and 70 frames."""
    cut = [np.full((frames, 1), level, np.float32) for frames, level in ((10, 3), (20, 4), (70, 5))]
    return [np.full((40, 1), 1, np.float32), (np.full((30, 1), 2, np.float32),), tuple(cut)]


def test_an_utterance_is_scored_by_the_mean_of_its_windows_weighted_by_their_lengths_or_as_told():
    guess_UP = predict(Levels(), windowed(), CPU)
    np.testing.assert_allclose(guess_UP[:, 0], [1, 2, 0.1 * 3 + 0.2 * 4 + 0.7 * 5], rtol=1e-12)
    shares = [np.ones(1), np.ones(1), np.array([0.5, 0.5, 0.0])]
    np.testing.assert_allclose(predict(Levels(), windowed(), CPU, shares=shares)[:, 0], [1, 2, 3.5], rtol=1e-12)


def test_training_hears_one_window_of_each_utterance_an_epoch_and_all_of_them_over_epochs():
    truth_UP = np.array([[0.1, 0.2, 0.3], [0.4, 0.1, 0.2], [0.3, 0.3, 0.1]])
    settings = FitConfig(epochs=20, batch=3, learning_rate=0.0, weight_decay=0.0, device="cpu")
    runs = []
    for ids in (["a", "b", "c"], ["a", "b", "c"], ["a", "b", "d"]):
        network, data = Levels(), TrainingExamples(windowed(), truth_UP, ids)
        list(HeadTraining(network, data, data, settings, seed=0))
        runs.append([tuple(sorted(epoch)) for epoch in network.heard])
    assert len(runs[0]) == 20 and set(runs[0]) == {(1, 2, 3), (1, 2, 4), (1, 2, 5)}
    assert runs[0] == runs[1] != runs[2]


class Listening(torch.nn.Module):
    """Says a constant, and notes the waveforms that it is given: in training by their keys, and in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.says = torch.nn.Parameter(torch.zeros(3))
        self.trained_on: list[dict[int, np.ndarray]] = []
        self.scored_on: list[np.ndarray] = []

    def forward(self, x_BS, samples_B, key_B=None):
        rows = [x_S[:samples].numpy() for x_S, samples in zip(x_BS, samples_B.tolist(), strict=True)]
        if key_B is None:
            self.scored_on += rows
        else:
            self.trained_on.append(dict(zip(key_B.tolist(), rows, strict=True)))
        return self.says.expand(len(x_BS), 3)


def test_augmentation_is_drawn_anew_in_each_epoch_for_what_is_trained_on_alone():
    wave_S = waves(1).inputs[0]
    data = TrainingExamples([wave_S] * 4, waves(4).truth_UP)
    settings = FitConfig(epochs=2, batch=4, device="cpu", augment=FitAugmentConfig(enabled=True, noise_p=1.0))
    runs = [Listening(), Listening()]
    for network in runs:
        list(HeadTraining(network, data, data, settings, seed=0))
    first, again = ([row for epoch in network.trained_on for row in epoch.values()] for network in runs)
    assert len(first) == 8 and all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert len({row.tobytes() for row in [wave_S.astype(np.float32) / 32768, *first]}) == 9
    assert {row.tobytes() for row in runs[0].scored_on} == {(wave_S.astype(np.float32) / 32768).tobytes()}


def test_features_have_no_waveform_to_augment():
    data = examples(4, 0)
    settings = FitConfig(epochs=1, batch=4, device="cpu", augment=FitAugmentConfig(enabled=True))
    with pytest.raises(ValueError, match="augmentation takes waveforms"):
        list(HeadTraining(head(), data, data, settings, seed=0))


def test_an_utterance_without_a_window_and_uneven_examples_are_refused():
    with pytest.raises(ValueError, match="has no window"):
        predict(Levels(), [()], CPU)
    with pytest.raises(ValueError, match=r"of \[2, 3\] utterances"):
        TrainingExamples(windowed(), np.zeros((3, 3)), ["a", "b"])


def test_an_encoder_is_trained_with_a_rate_of_its_own():
    data = waves(12)
    moved = {}
    for rate in (0.0, 1e-3):
        network = end_to_end()
        before = weights(network)
        list(HeadTraining(network, data, data, QUICK, seed=0, encoder_rate=rate))
        after = weights(network)
        moved[rate] = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("encoder.") for name in moved[0.0])
    assert "encoder.encoder.layers.0.weight" in moved[1e-3] and "encoder.context.gru.weight_hh_l0" in moved[1e-3]
    assert "recogniser.mix.weight" in moved[0.0]


@pytest.mark.parametrize("thaw", [0, 1, 3])
def test_an_encoder_moves_from_the_epoch_on_in_which_it_thaws(thaw):
    network, data = end_to_end(), waves(12)
    settings = FitConfig(epochs=4, batch=8, thaw_epoch=thaw, device="cpu")
    states = [weights(network)]
    states += [weights(network) for _ in HeadTraining(network, data, data, settings, seed=0, encoder_rate=1e-3)]
    for part, first in (("encoder.encoder.layers.0.weight", max(thaw, 1)), ("recogniser.mix.weight", 1)):
        moved = [not torch.equal(old[part], new[part]) for old, new in pairwise(states)]
        assert moved == [number >= first for number in range(1, 5)]


def test_patience_does_not_end_before_what_is_frozen_had_its_turn():
    settings = FitConfig(epochs=9, batch=8, learning_rate=0.0, weight_decay=0.0, patience=2, thaw_epoch=5, device="cpu")
    data = waves(12)
    assert len(list(HeadTraining(end_to_end(), data, data, settings, seed=0))) == 6
    assert len(list(HeadTraining(head(), examples(12, 0), examples(12, 1), settings, seed=0))) == 3, "nothing is frozen"


def test_a_long_gradient_is_shortened_and_a_short_one_left():
    _, whole = update(head(), examples(32, 0))
    norm = float(torch.cat([each.flatten() for each in whole.values()]).norm())
    for limit, factor in ((norm / 4, 0.25), (norm * 4, 1.0)):
        _, clipped = update(head(), examples(32, 0), clip_norm=limit)
        for name, gradient in whole.items():
            torch.testing.assert_close(clipped[name], factor * gradient, atol=1e-6, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_way_out():
    bad = examples(10, 0)
    bad.inputs[3][0, 0] = np.inf
    with pytest.raises(DivergedError, match=r"lower fit\.learning_rate"):
        list(HeadTraining(head(), bad, examples(5, 1), QUICK, seed=0))


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="add up to more than 1"):
        FitConfig(activation_weight=0.7, valence_weight=0.7)
    with pytest.raises(UserError, match=r"fit\.batch=1"):
        FitConfig(batch=1)
    with pytest.raises(UserError, match=r"fit\.thaw_epoch=51 is after the last one, fit\.epochs=50"):
        FitConfig(thaw_epoch=51)
    with pytest.raises(UserError, match=r"fit\.augment\.noise_p=2\.0 is not a probability"):
        FitConfig(augment=FitAugmentConfig(noise_p=2.0))
    for name in ("micro_batch", "clip_norm", "thaw_epoch"):
        with pytest.raises(UserError, match=rf"fit\.{name}=-1"):
            FitConfig(**{name: -1})
    assert sum(FitConfig(activation_weight=0.2, valence_weight=0.5).weights) == pytest.approx(1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            device(FitConfig(device="cuda"))
