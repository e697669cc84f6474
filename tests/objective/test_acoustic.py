import math

import pytest
import torch
from torch import Tensor

from cpcscale.handmade.targets import FRAME_NAMES, WINDOW_NAMES
from cpcscale.objective.acoustic import AcousticConfig, Frames, Standardised, Window
from cpcscale.objective.objective import Features, Rows

FRAMES = (40, 30, 0, 21)
CONFIG = AcousticConfig(frames=0.5, window=0.5)


def rows() -> Rows:
    """Four rows of up to 40 frames with measures, of which some are unknown."""
    random = torch.Generator().manual_seed(1)
    frames_B = torch.tensor(FRAMES)
    frame_BTF = 3 * torch.randn(4, 40, len(FRAME_NAMES), generator=random)
    frame_BTF[:, :, 2] = (frame_BTF[:, :, 2] > 0).float()
    frame_BTF[:, ::3, 1] = torch.nan
    frame_BTF[torch.arange(40) >= frames_B.unsqueeze(1)] = torch.nan
    window_BF = 3 * torch.randn(4, len(WINDOW_NAMES), generator=random)
    window_BF[2:] = torch.nan
    window_BF[1, 70:80] = torch.nan
    return Rows(frames_B, *(torch.zeros(4, dtype=torch.int64) for _ in range(3)), None, frame_BTF, window_BF)


def features(c_BTD: Tensor) -> Features:
    return Features(torch.zeros(4, 40, 3), c_BTD, torch.zeros(4, 40, 2, 3))


def contexts() -> Tensor:
    return torch.randn(4, 40, 5, generator=torch.Generator().manual_seed(2))


def constants(head: torch.nn.Module) -> tuple[Tensor, Tensor]:
    (targets,) = [module for module in head.modules() if isinstance(module, Standardised)]
    random = torch.Generator().manual_seed(3)
    width = len(targets.mean_F)
    targets.set(torch.randn(width, generator=random), 0.5 + torch.rand(width, generator=random))
    return targets.mean_F, targets.deviation_F


def huber(predicted: float, target: float, mean: float, deviation: float) -> float:
    size = abs(predicted - max(-4.0, min(4.0, (target - mean) / deviation)))
    return size**2 / 2 if size < 1 else size - 0.5


def entropy(score: float, voiced: float) -> float:
    return math.log2(1 + math.exp(-score if voiced else score))


def test_the_loss_of_frames_is_its_definition_written_out():
    objective = Frames(CONFIG)
    torch.manual_seed(0)
    head, known = objective.head(3, 5), rows()
    mean_F, deviation_F = (part.tolist() for part in constants(head))
    assert (mean_F[2], deviation_F[2]) == (0, 1), "voicing is 0 or 1"
    outputs = head(features(contexts()), known)
    (sums_N,), _ = objective(outputs, known, None)
    expected, counts = [], []
    for number, ahead in enumerate((0, 12)):
        for columns in ((0,), (1,), (2,), range(3, 22)):
            losses = [
                entropy(outputs[0][row, t, number, f].item(), target)
                if f == 2
                else huber(outputs[0][row, t, number, f].item(), target, mean_F[f], deviation_F[f])
                for row in range(4)
                for t in range(max(0, FRAMES[row] - ahead))
                for f in columns
                if not math.isnan(target := known.frame_BTF[row, t + ahead, f].item())
            ]
            expected.append(sum(losses))
            counts.append(len(losses))
    assert sums_N.tolist() == pytest.approx(expected, rel=1e-5)
    assert objective.count(known, None).tolist() == counts
    figures = objective.figures(sums_N.unsqueeze(0) / torch.tensor(counts))
    assert figures["frames_loss"] == pytest.approx(
        sum(total / count for total, count in zip(expected, counts, strict=True)) / 8, rel=1e-5
    )


def test_the_loss_of_a_window_is_its_definition_written_out_and_leaves_out_the_start_of_the_state():
    objective = Window(CONFIG)
    torch.manual_seed(0)
    head, known, c_BTD = objective.head(3, 5), rows(), contexts()
    mean_F, deviation_F = (part.tolist() for part in constants(head))
    predicted_BF, _ = outputs = head(features(c_BTD), known)
    for row in (0, 1):
        real_TD = c_BTD[row, 20 : FRAMES[row]]
        pooled = torch.cat([real_TD.mean(0), real_TD.std(0, correction=0)])
        torch.testing.assert_close(predicted_BF[row], head.map(pooled), rtol=1e-4, atol=1e-5)
    losses = [
        huber(predicted_BF[row, f].item(), target, mean_F[f], deviation_F[f])
        for row in range(4)
        for f in range(len(WINDOW_NAMES))
        if not math.isnan(target := known.window_BF[row, f].item())
    ]
    sums_MN, _ = objective(outputs, known, None)
    assert sums_MN.item() == pytest.approx(sum(losses), rel=1e-5)
    assert objective.count(known, None).tolist() == [len(losses)] == [2 * 96 - 10]


@pytest.mark.parametrize("objective", [Frames(CONFIG), Window(CONFIG)], ids=["frames", "window"])
def test_gradients_are_finite_and_none_comes_from_frames_and_rows_that_are_not_audio(objective):
    torch.manual_seed(0)
    head, known = objective.head(3, 5), rows()
    c_BTD = contexts().requires_grad_()
    outputs = head(features(c_BTD), known)
    _, gradients = objective(outputs, known, None, torch.ones(objective.shape[1]))
    torch.autograd.backward(outputs[0], gradients[0])
    assert c_BTD.grad.isfinite().all() and c_BTD.grad[0].any()
    for row, count in enumerate(FRAMES):
        assert not c_BTD.grad[row, count:].any()


def test_a_target_that_is_always_the_same_is_not_divided_by_0():
    targets = Standardised("window_BF", 2)
    targets.set(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    assert targets.deviation_F.tolist() == [1.0, 4.0]
