import math

import pytest
import torch

from cpcscale.objective.objective import Features, Rows
from cpcscale.objective.pooled import Pooled, PooledConfig
from cpcscale.train.ranks import Ranks

ALONE = Ranks(0, 1, 1, torch.device("cpu"))
# The third is too short, the fourth another window of the first's utterance, the last is padding.
FRAMES = (130, 100, 99, 121, 160, 0)
UTTERANCES = (7, 8, 9, 7, 10, -1)


def rows(utterances: tuple[int, ...] = UTTERANCES) -> Rows:
    zero_B = torch.zeros(len(FRAMES), dtype=torch.int64)
    return Rows(torch.tensor(FRAMES), zero_B, zero_B, torch.tensor(utterances))


def features() -> Features:
    random = torch.Generator().manual_seed(1)
    z_BTC, c_BTD = (torch.randn(len(FRAMES), 160, width, generator=random) for width in (4, 5))
    return Features(z_BTC, c_BTD, torch.zeros(len(FRAMES), 160, 1, 4))


def test_value_count_and_accuracy_are_the_definition_written_out():
    objective = Pooled(PooledConfig(weight=0.2))
    torch.manual_seed(0)
    head, known, made = objective.head(4, 5), rows(), features()
    u, v = [], []
    for row, frames in enumerate(FRAMES):
        half = frames // 2
        u.append(head.map(made.c_BTD[row, :half].mean(0)))
        v.append(made.z_BTC[row, half + 12 : frames].mean(0))
    score = [[10 * torch.cosine_similarity(one, other, dim=0).item() for other in v] for one in u]
    losses, correct = [], 0
    for row in (0, 1, 3, 4):
        others = [each for each in (0, 1, 3, 4) if UTTERANCES[each] != UTTERANCES[row]]
        total = sum(math.exp(score[row][each]) for each in (row, *others))
        losses.append((math.log(total) - score[row][row]) / math.log(len(others) + 1))
        correct += all(score[row][row] > score[row][each] for each in others)
    sums_MN, _ = objective(head(made, known), known, ALONE)
    assert sums_MN.flatten().tolist() == pytest.approx([sum(losses), correct], rel=1e-5)
    assert objective.count(known, ALONE).tolist() == [4]


def test_the_second_half_of_the_contexts_and_the_gap_are_never_used():
    objective, known, made = Pooled(PooledConfig()), rows(), features()
    head = objective.head(4, 5)
    made.c_BTD.requires_grad_()
    made.z_BTC.requires_grad_()
    outputs = head(made, known)
    _, gradients = objective(outputs, known, ALONE, torch.ones(1))
    torch.autograd.backward(outputs, gradients)
    for row, frames in enumerate(FRAMES):
        half = frames // 2
        assert not made.c_BTD.grad[row, half:].any()
        assert not made.z_BTC.grad[row, : half + 12].any() and not made.z_BTC.grad[row, frames:].any()
        if frames >= 100:
            # Into both sides.
            assert made.c_BTD.grad[row, :half].all() and made.z_BTC.grad[row, half + 12 : frames].all()


def test_gradients_are_those_of_the_weighted_loss_of_all_rows_into_what_is_compared_and_into_negatives():
    objective, known, made = Pooled(PooledConfig()), rows(), features()
    outputs = tuple(part.detach().double() for part in objective.head(4, 5)(made, known))
    weight_N = torch.tensor([0.7], dtype=torch.float64)
    _, gradients = objective(outputs, known, ALONE, weight_N)
    random = torch.Generator().manual_seed(2)
    for number in range(2):
        step = 1e-5 * torch.randn(outputs[number].shape, generator=random, dtype=torch.float64)
        moved = [[part + sign * step * (at == number) for at, part in enumerate(outputs)] for sign in (1, -1)]
        up, down = (objective(tuple(parts), known, ALONE)[0][0].item() for parts in moved)
        assert 0.7 * (up - down) / 2 == pytest.approx((gradients[number] * step).sum().item(), rel=1e-4)


def test_rows_without_a_negative_do_not_count():
    objective, known, made = Pooled(PooledConfig()), rows((7,) * 6), features()
    outputs = objective.head(4, 5)(made, known)
    sums_MN, gradients = objective(outputs, known, ALONE, torch.ones(1))
    assert objective.count(known, ALONE).tolist() == [0]
    assert sums_MN.flatten().tolist() == [0, 0]
    assert all(gradient.isfinite().all() and not gradient.any() for gradient in gradients)
