import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cpcscale.bench import plain_network
from cpcscale.errors import UserError
from cpcscale.objective import infonce as objective
from cpcscale.objective.infonce import (
    InfoNCEConfig,
    LossGradients,
    LossSums,
    NegativePool,
    ScoredRows,
    count_predictions,
    frame_content,
    infonce,
    prepare_vectors,
)
from cpcscale.objective.negatives import Scope, draw_each, draw_shared

SPECS = [
    InfoNCEConfig(negatives=6, scope=scope, draw=draw, score=score, temperature=temperature, learn_temperature=learnt)
    for scope in ("utterance", "group", "batch", "mixed")
    for draw in ("each", "shared")
    for score, temperature, learnt in (("dot", 1.0, False), ("dot", 3.0, True), ("cosine", 0.1, False))
]
OWN = [spec for spec in SPECS if spec.scope == "utterance"]
FRAMES = (9, 4, 0, 5, 1, 12)
GROUPS = (1, 2, 1, 1, 2, 2)
# Another weight for each k, so that a mix-up of steps shows.
WEIGHT_K = torch.tensor([1.0, 2.0, 5.0])


def case(frames: tuple[int, ...] = FRAMES, channels: int = 5, steps: int = 3, longest: int = 12) -> ScoredRows:
    """Rows with noise in the padding too, every frame of other audio."""
    random = torch.Generator().manual_seed(3)
    z_BTC = torch.randn(len(frames), longest, channels, generator=random)
    predictions_BTKC = torch.randn(len(frames), longest, steps, channels, generator=random)
    key_B = torch.randint(-(2**62), 2**62, (len(frames),), generator=random)
    content_BT = torch.arange(len(frames) * longest).view(len(frames), longest)
    return ScoredRows(z_BTC, predictions_BTKC, torch.tensor(1.0), torch.tensor(frames), key_B, content_BT)


def rows_of(whole: ScoredRows, rows: slice | Tensor) -> ScoredRows:
    parts = {name: getattr(whole, name)[rows] for name in ("z_BTC", "predictions_BTKC", "frames_B", "key_B")}
    return replace(whole, **parts, content_BT=None if whole.content_BT is None else whole.content_BT[rows])


def pool_of(
    whole: ScoredRows, spec: InfoNCEConfig, rows: slice = slice(None), z_RTC: Tensor | None = None
) -> NegativePool | None:
    """What these rows of the whole batch draw from under the scope of `spec`."""
    if spec.scope == "utterance":
        return None
    label_R = torch.tensor(GROUPS) * (spec.scope == "group")
    mixed, longest = spec.scope == "mixed", whole.z_BTC.shape[1]
    scope = Scope.of_pool(whole.frames_B, whole.key_B, label_R, longest, rows, mixed=mixed)
    return NegativePool(whole.z_BTC if z_RTC is None else z_RTC, scope, whole.content_BT)


def scaled(spec: InfoNCEConfig) -> ScoredRows:
    """The rows as the objective takes them under `spec`."""
    rows = case()
    z_BTC, predictions_BTKC = prepare_vectors(rows.z_BTC, rows.predictions_BTKC, spec)
    scale = torch.tensor(1 / spec.temperature)
    return replace(rows, z_BTC=z_BTC, predictions_BTKC=predictions_BTKC, scale=scale)


def all_of(gradients: LossGradients | None, rows: slice = slice(None)) -> list[Tensor]:
    """Gradients of latents (their part in the pool added), predictions and scale."""
    assert gradients is not None
    pool = 0 if gradients.pool_RTC is None else gradients.pool_RTC[rows]
    return [gradients.z_BTC + pool, gradients.predictions_BTKC, gradients.scale]


def slow_infonce(rows: ScoredRows, spec: InfoNCEConfig) -> tuple[list[Tensor], list[int]]:
    """One prediction at a time, from the definition: summed loss and correct predictions for each k."""
    labels = {"utterance": range(len(FRAMES)), "group": GROUPS}.get(spec.scope, [0] * len(FRAMES))
    frames, keys, losses, correct = rows.frames_B.tolist(), rows.key_B.tolist(), [], []
    for k in range(1, 4):
        loss, right = rows.z_BTC.new_zeros(()), 0
        for row in range(len(frames)):
            window = sorted((one for one in range(len(frames)) if labels[one] == labels[row]), key=keys.__getitem__)
            numbered = [(one, frame) for one in window for frame in range(frames[one])]
            own, mixed = slice(row, row + 1), spec.scope == "mixed"
            scope = Scope.of_pool(rows.frames_B, rows.key_B, torch.tensor(labels), 12, own, mixed=mixed)
            drawn_TN = draw_each(rows.key_B[row : row + 1], scope, k, 12, spec.negatives)[0]
            together_N, spare_N = (part[0] for part in draw_shared(rows.key_B[row : row + 1], scope, k, spec.negatives))
            for t in range(frames[row] - k):
                positive = numbered.index((row, t + k))
                spared_N = torch.where(together_N == positive, spare_N, together_N)
                numbers = (spared_N if spec.draw == "shared" else drawn_TN[t]).tolist()
                candidates = [(row, t + k), *(numbered[number] for number in numbers)]
                assert (row, t + k) not in candidates[1:]
                p_C = rows.predictions_BTKC[row, t, k - 1]
                scores = torch.stack([(p_C * rows.z_BTC[place]).sum() for place in candidates]) * rows.scale
                loss = loss + scores.exp().sum().log() - scores[0]
                right += bool((scores[0] > scores[1:]).all())
        losses.append(loss)
        correct.append(right)
    return losses, correct


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_and_gradients_equal_the_definition_written_out(spec):
    rows = scaled(spec)
    sums, gradients = infonce(rows, spec, pool=pool_of(rows, spec), weight_K=WEIGHT_K)
    leaves = [part.clone().requires_grad_() for part in (rows.z_BTC, rows.predictions_BTKC, rows.scale)]
    losses, correct = slow_infonce(ScoredRows(*leaves, rows.frames_B, rows.key_B), spec)

    torch.testing.assert_close(sums.loss_K, torch.stack(losses), rtol=1e-5, atol=1e-5)
    assert sums.correct_K.tolist() == correct
    assert sums.false_K.tolist() == [0, 0, 0]
    (torch.stack(losses) * WEIGHT_K).sum().backward()
    found = all_of(gradients)
    for name, one, leaf in zip(("z", "predictions", "scale"), found, leaves, strict=True):
        if name != "scale" or spec.learn_temperature:
            torch.testing.assert_close(
                one, leaf.grad, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_equals_the_plain_loss_under_autograd_at_other_shapes(spec):
    rows = case((40, 0, 33, 40, 7, 21), channels=16, longest=40)
    leaves = [part.clone().requires_grad_() for part in (rows.z_BTC, rows.predictions_BTKC, rows.scale)]
    loss_K = plain_network.loss_K(
        ScoredRows(*leaves, rows.frames_B, rows.key_B), spec, pool_of(replace(rows, z_BTC=leaves[0]), spec)
    )
    (loss_K * WEIGHT_K).sum().backward()
    sums, gradients = infonce(rows, spec, pool=pool_of(rows, spec), weight_K=WEIGHT_K)
    torch.testing.assert_close(sums.loss_K, loss_K.detach(), rtol=1e-5, atol=1e-5)
    for one, leaf in zip(all_of(gradients)[:2], leaves[:2], strict=True):
        torch.testing.assert_close(one, leaf.grad, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_padding_gives_no_loss_and_gets_no_gradient(spec):
    rows = scaled(spec)
    _, gradients = infonce(rows, spec, pool=pool_of(rows, spec), weight_K=WEIGHT_K)
    z_BTC, predictions_BTKC, _ = all_of(gradients)
    for row, frames in enumerate(rows.frames_B.tolist()):
        assert not z_BTC[row, frames:].any()
        assert not predictions_BTKC[row, max(0, frames - 1) :].any()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_stands_in_the_padding_does_not_matter(spec):
    rows = scaled(spec)
    before, _ = infonce(rows, spec, pool=pool_of(rows, spec))
    for row, frames in enumerate(rows.frames_B.tolist()):
        rows.z_BTC[row, frames:] = 1e4
        rows.predictions_BTKC[row, frames:] = -1e4
    after, _ = infonce(rows, spec, pool=pool_of(rows, spec))
    torch.testing.assert_close(before.loss_K, after.loss_K)
    if spec.scope == "utterance":
        assert before.correct_K.tolist() == after.correct_K.tolist()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 4, 6], [0, 2, 3, 6]])
def test_sums_and_gradients_of_any_split_add_up_to_those_of_the_batch(spec, cuts):
    whole = scaled(spec)
    sums, gradients = infonce(whole, spec, pool=pool_of(whole, spec), weight_K=WEIGHT_K)
    pieces = [slice(*cut) for cut in itertools.pairwise(cuts)]
    parts = [infonce(rows_of(whole, at), spec, pool=pool_of(whole, spec, at), weight_K=WEIGHT_K) for at in pieces]
    torch.testing.assert_close(sum(part.loss_K for part, _ in parts), sums.loss_K)
    assert sum(part.correct_K for part, _ in parts).tolist() == sums.correct_K.tolist()
    z_BTC = torch.cat([part.z_BTC for _, part in parts])
    if spec.scope != "utterance":
        z_BTC += sum(part.pool_RTC for _, part in parts)
    torch.testing.assert_close(z_BTC, all_of(gradients)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_few_rows_at_a_time_change_nothing(spec, monkeypatch):
    rows = scaled(spec)
    sums, gradients = infonce(rows, spec, pool=pool_of(rows, spec), weight_K=WEIGHT_K)
    monkeypatch.setitem(objective._CHUNK, "cpu", 1)
    again, others = infonce(rows, spec, pool=pool_of(rows, spec), weight_K=WEIGHT_K)
    torch.testing.assert_close(again.loss_K, sums.loss_K)
    assert again.correct_K.tolist() == sums.correct_K.tolist()
    for one, other in zip(all_of(gradients), all_of(others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draw", ["each", "shared"])
@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize(("frames", "channels"), [(14, 64), (14, 100), (15, 128), (37, 5), (128, 64), (129, 128)])
def test_a_constant_encoder_gets_accuracy_0_and_loss_ln_51(draw, score, frames, channels):
    """Ties count as wrong on every shape, also where a matrix product rounds its edge columns otherwise."""
    spec = InfoNCEConfig(negatives=50, draw=draw, score=score, temperature=0.1 if score == "cosine" else 1.0)
    rows = case((frames,) * 64, channels, 12, frames)
    z_BTC = rows.z_BTC[:1, :1].expand(64, frames, channels).contiguous()
    z_BTC, predictions_BTKC = prepare_vectors(z_BTC, rows.predictions_BTKC, spec)
    rows = replace(rows, z_BTC=z_BTC, predictions_BTKC=predictions_BTKC, scale=torch.tensor(1 / spec.temperature))
    sums, _ = infonce(rows, spec)
    assert sums.correct_K.tolist() == [0] * 12
    loss_K = sums.loss_K / count_predictions(rows.frames_B, 12)
    torch.testing.assert_close(loss_K, torch.full((12,), math.log(51)), rtol=0, atol=2e-5)
    assert spec.chance == pytest.approx(1 / 51)


@pytest.mark.parametrize("spec", OWN, ids=str)
def test_an_encoder_of_zeros_gets_accuracy_0_and_finite_gradients(spec):
    rows = case()
    leaf = torch.zeros_like(rows.z_BTC, requires_grad=True)
    z_BTC, predictions_BTKC = prepare_vectors(leaf, rows.predictions_BTKC, spec)
    made = replace(rows, z_BTC=z_BTC.detach(), predictions_BTKC=predictions_BTKC)
    sums, gradients = infonce(made, spec, weight_K=WEIGHT_K)
    z_BTC.backward(gradients.z_BTC)
    assert sums.correct_K.tolist() == [0, 0, 0]
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("draw", ["each", "shared"])
def test_a_perfect_predictor_is_always_right(draw):
    z_BTC = torch.eye(12).expand(2, 12, 12).contiguous()
    ahead = torch.stack([torch.roll(z_BTC, -k, dims=1) for k in (1, 2, 3)], dim=2)
    frames_B, content_BT = torch.tensor([12, 7]), torch.arange(24).view(2, 12)
    rows = ScoredRows(z_BTC, 50 * ahead, torch.tensor(1.0), frames_B, torch.tensor([1, 2]), content_BT)
    sums, _ = infonce(rows, InfoNCEConfig(draw=draw))
    assert sums.correct_K.tolist() == count_predictions(frames_B, 3).tolist() == [17, 15, 13]
    assert sums.loss_K.max() < 1e-6


@pytest.mark.parametrize("draw", ["each", "shared"])
def test_random_latents_stand_at_chance(draw):
    spec = InfoNCEConfig(negatives=9, draw=draw)
    rows = case((200,) * 8, 32, 2, 200)
    sums, _ = infonce(rows, spec)
    assert (sums.correct_K.sum() / count_predictions(rows.frames_B, 2).sum()).item() == pytest.approx(
        spec.chance, abs=0.03
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_more_negatives_than_frames_give_a_finite_loss(spec):
    rows = scaled(spec)
    sums, gradients = infonce(rows, replace(spec, negatives=500), pool=pool_of(rows, spec), weight_K=WEIGHT_K)
    assert sums.loss_K.isfinite().all()
    assert all(part.isfinite().all() for part in all_of(gradients))


@pytest.mark.parametrize("draw", ["each", "shared"])
def test_frames_of_the_same_audio_are_counted_as_false_negatives(draw):
    """Frames 0..5 of a row are heard again as 6..11: of 11 other frames one is the positive's twin."""
    rows = case((12,) * 400)
    twins = replace(rows, content_BT=torch.arange(12).remainder(6).expand(400, 12))
    sums, _ = infonce(twins, InfoNCEConfig(negatives=30, draw=draw))
    share_K = sums.false_K / count_predictions(rows.frames_B, 3)
    torch.testing.assert_close(share_K, torch.full((3,), 1 / 11, dtype=torch.float64), rtol=0.05, atol=0)


def test_content_is_the_same_for_the_same_audio_alone():
    random = torch.Generator().manual_seed(1)
    wave_BS = torch.randint(-3, 4, (3, 1600), generator=random).short()
    wave_BS[1, 160:320] = wave_BS[0, 320:480]
    wave_BS[2] = 0
    content_BT = frame_content(wave_BS, 10)
    assert content_BT[1, 1] == content_BT[0, 2]
    assert (content_BT[2] == 0).all()
    assert len(content_BT[:2].unique()) == 19


def test_half_precision_latents_are_scored_in_single_precision():
    rows, spec = case(), SPECS[0]
    halves = prepare_vectors(rows.z_BTC.bfloat16(), rows.predictions_BTKC.bfloat16(), spec)
    assert all(part.dtype == torch.float32 for part in halves)
    sums, gradients = infonce(replace(rows, z_BTC=halves[0], predictions_BTKC=halves[1]), spec, weight_K=WEIGHT_K)
    assert sums.loss_K.dtype == gradients.z_BTC.dtype == torch.float32


def test_without_content_nothing_but_the_loss_is_counted():
    sums, _ = infonce(replace(case(), content_BT=None), SPECS[0])
    whole, _ = infonce(case(), SPECS[0])
    assert isinstance(sums, LossSums)
    torch.testing.assert_close(sums.loss_K, whole.loss_K, rtol=0, atol=0)
    assert sums.correct_K.tolist() == [0, 0, 0]
    assert any(whole.correct_K.tolist())


def test_counts_are_the_predictions_whose_target_is_real_audio():
    assert count_predictions(torch.tensor([5, 0, 1, 3]), 4).tolist() == [4 + 2, 3 + 1, 2, 1]
    assert count_predictions(torch.tensor([0, 0]), 2).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [{"negatives": 0}, {"temperature": 0.0}])
def test_an_objective_that_compares_nothing_is_refused(bad):
    with pytest.raises(UserError, match="objective"):
        InfoNCEConfig(**bad)
