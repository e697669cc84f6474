import itertools
import math

import pytest
import torch
from torch import Tensor

from cpcscale.errors import UserError
from cpcscale.objective.infonce import InfoNCEConfig, counts, infonce
from cpcscale.objective.negatives import draw

SCORES = [
    InfoNCEConfig(negatives=6, score="dot"),
    InfoNCEConfig(negatives=6, score="dot", temperature=3.0),
    InfoNCEConfig(negatives=6, score="cosine", temperature=0.1),
]
RAGGED = (9, 4, 0, 5, 1, 12)


def case(frames: tuple[int, ...] = RAGGED, channels: int = 5, steps: int = 3, longest: int = 12) -> list[Tensor]:
    """(z_BTC, predictions_BTKC, frames_B, key_B) with noise in the padding too."""
    random = torch.Generator().manual_seed(3)
    z_BTC = torch.randn(len(frames), longest, channels, generator=random)
    predictions_BTKC = torch.randn(len(frames), longest, steps, channels, generator=random)
    key_B = torch.randint(-(2**62), 2**62, (len(frames),), generator=random)
    return [z_BTC, predictions_BTKC, torch.tensor(frames), key_B]


def slow_infonce(
    z_BTC: Tensor, predictions_BTKC: Tensor, frames_B: Tensor, key_B: Tensor, spec: InfoNCEConfig
) -> tuple[list[Tensor], list[int], list[int]]:
    """One prediction at a time, from the definition: summed loss, correct predictions and their count for each k."""
    losses, correct, count = [], [], []
    for k in range(1, predictions_BTKC.shape[2] + 1):
        loss, right, seen = z_BTC.new_zeros(()), 0, 0
        for row, frames in enumerate(frames_B.tolist()):
            for t in range(frames - k):
                numbers = draw(key_B[row : row + 1], frames_B[row : row + 1], k, t + 1, spec.negatives)[0, t]
                scores = [
                    score(predictions_BTKC[row, t, k - 1], z_BTC[row, frame], spec)
                    for frame in (t + k, *numbers.tolist())
                ]
                loss = loss + torch.stack(scores).exp().sum().log() - scores[0]
                right += all(scores[0] > other for other in scores[1:])
                seen += 1
        losses.append(loss)
        correct.append(right)
        count.append(seen)
    return losses, correct, count


def score(prediction: Tensor, latent: Tensor, spec: InfoNCEConfig) -> Tensor:
    value = (prediction * latent).sum()
    if spec.score == "cosine":
        value = value / prediction.square().sum().sqrt() / latent.square().sum().sqrt()
    return value / spec.temperature


@pytest.mark.parametrize("spec", SCORES, ids=str)
def test_values_and_gradients_equal_the_definition_written_out(spec):
    fast, slow = case(), case()
    for leaves in (fast, slow):
        leaves[0].requires_grad_()
        leaves[1].requires_grad_()
    sums = infonce(*fast, spec)
    losses, correct, count = slow_infonce(*slow, spec)

    torch.testing.assert_close(sums.loss_K, torch.stack(losses), rtol=1e-5, atol=1e-5)
    assert sums.correct_K.tolist() == correct
    assert counts(fast[2], 3).tolist() == count
    # Another weight for each k, so that a mix-up of steps shows.
    weight_K = torch.tensor([1.0, 2.0, 5.0])
    (sums.loss_K * weight_K).sum().backward()
    (torch.stack(losses) * weight_K).sum().backward()
    for one, other in zip(fast[:2], slow[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SCORES, ids=str)
def test_padding_gives_no_loss_and_gets_no_gradient(spec):
    z_BTC, predictions_BTKC, frames_B, key_B = case()
    z_BTC.requires_grad_()
    predictions_BTKC.requires_grad_()
    infonce(z_BTC, predictions_BTKC, frames_B, key_B, spec).loss_K.sum().backward()
    for row, frames in enumerate(frames_B.tolist()):
        assert not z_BTC.grad[row, frames:].any()
        assert not predictions_BTKC.grad[row, max(0, frames - 1) :].any()
    assert not z_BTC.grad[frames_B == 1].any(), "one frame predicts nothing"


def test_what_stands_in_the_padding_does_not_matter():
    z_BTC, predictions_BTKC, frames_B, key_B = case()
    before = infonce(z_BTC, predictions_BTKC, frames_B, key_B, SCORES[0])
    for row, frames in enumerate(frames_B.tolist()):
        z_BTC[row, frames:] = 1e4
        predictions_BTKC[row, frames:] = -1e4
    after = infonce(z_BTC, predictions_BTKC, frames_B, key_B, SCORES[0])
    torch.testing.assert_close(before.loss_K, after.loss_K)
    assert before.correct_K.tolist() == after.correct_K.tolist()


def test_the_sums_of_any_split_add_up_to_those_of_the_batch():
    whole_case = case()
    whole = infonce(*whole_case, SCORES[2])
    for cuts in ([0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 4, 6], [0, 2, 3, 6]):
        parts = [
            infonce(*(tensor[first:last] for tensor in whole_case), SCORES[2])
            for first, last in itertools.pairwise(cuts)
        ]
        torch.testing.assert_close(sum(part.loss_K for part in parts), whole.loss_K)
        assert sum(part.correct_K for part in parts).tolist() == whole.correct_K.tolist()


@pytest.mark.parametrize("score_name", ["dot", "cosine"])
@pytest.mark.parametrize(("frames", "channels"), [(14, 64), (14, 100), (15, 128), (37, 5), (128, 64), (129, 128)])
def test_a_constant_encoder_gets_accuracy_0_and_loss_ln_51(score_name, frames, channels):
    """Ties count as wrong on every shape, also where a matrix product rounds its edge columns otherwise."""
    spec = InfoNCEConfig(negatives=50, score=score_name, temperature=0.1 if score_name == "cosine" else 1.0)
    z_BTC, predictions_BTKC, frames_B, key_B = case((frames,) * 64, channels, 12, frames)
    z_BTC = z_BTC[:1, :1].expand(64, frames, channels).contiguous()
    sums = infonce(z_BTC, predictions_BTKC, frames_B, key_B, spec)
    assert sums.correct_K.tolist() == [0] * 12
    torch.testing.assert_close(sums.loss_K / counts(frames_B, 12), torch.full((12,), math.log(51)), rtol=0, atol=2e-5)
    assert spec.chance == pytest.approx(1 / 51)


@pytest.mark.parametrize("score_name", ["dot", "cosine"])
def test_an_encoder_of_zeros_gets_accuracy_0_and_finite_gradients(score_name):
    z_BTC, predictions_BTKC, frames_B, key_B = case()
    z_BTC = torch.zeros_like(z_BTC).requires_grad_()
    sums = infonce(z_BTC, predictions_BTKC, frames_B, key_B, InfoNCEConfig(score=score_name))
    sums.loss_K.sum().backward()
    assert sums.correct_K.tolist() == [0, 0, 0]
    assert z_BTC.grad.isfinite().all()


def test_a_perfect_predictor_is_always_right():
    z_BTC = torch.eye(12).expand(2, 12, 12)
    ahead = torch.stack([torch.roll(z_BTC, -k, dims=1) for k in (1, 2, 3)], dim=2)
    frames_B = torch.tensor([12, 7])
    sums = infonce(z_BTC, 50 * ahead, frames_B, torch.tensor([1, 2]), InfoNCEConfig())
    assert sums.correct_K.tolist() == counts(frames_B, 3).tolist() == [17, 15, 13]
    assert sums.loss_K.max() < 1e-6


def test_random_latents_stand_at_chance():
    spec = InfoNCEConfig(negatives=9, score="cosine", temperature=1.0)
    inputs = case((200,) * 8, 32, 2, 200)
    sums = infonce(*inputs, spec)
    assert (sums.correct_K.sum() / counts(inputs[2], 2).sum()).item() == pytest.approx(spec.chance, abs=0.03)


def test_more_negatives_than_frames_give_a_finite_loss():
    sums = infonce(*case(), InfoNCEConfig(negatives=500))
    assert sums.loss_K.isfinite().all()


def test_half_precision_latents_are_scored_in_single_precision():
    z_BTC, predictions_BTKC, frames_B, key_B = case()
    halves = z_BTC.bfloat16(), predictions_BTKC.bfloat16()
    one = infonce(*halves, frames_B, key_B, SCORES[0])
    other = infonce(*(half.float() for half in halves), frames_B, key_B, SCORES[0])
    assert one.loss_K.dtype == torch.float32
    torch.testing.assert_close(one.loss_K, other.loss_K, rtol=0, atol=0)


def test_counts_are_the_predictions_whose_target_is_real_audio():
    assert counts(torch.tensor([5, 0, 1, 3]), 4).tolist() == [4 + 2, 3 + 1, 2, 1]
    assert counts(torch.tensor([0, 0]), 2).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [{"negatives": 0}, {"temperature": 0.0}])
def test_an_objective_that_compares_nothing_is_refused(bad):
    with pytest.raises(UserError, match="objective"):
        InfoNCEConfig(**bad)
