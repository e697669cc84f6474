import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from cpcscale.objective.negatives import draw

_MASK = (1 << 64) - 1


def splitmix(key: int, value: int) -> int:
    """Steele et al. 2014, on Python's unbounded integers."""
    state = (key + (value + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def slow_draw(key: int, frames: int, k: int, t: int, number: int, negatives: int) -> int:
    """The definition, one negative at a time: a keyed choice among all frames of the utterance but t + k."""
    others = [frame for frame in range(frames) if frame != t + k]
    hashed = splitmix(splitmix(key & _MASK, k), t * negatives + number)
    return others[((hashed & 0x7FFFFFFF) * len(others)) >> 31]


def keys(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def drawn(frames: int, k: int, negatives: int, rows: int, key: int = 0) -> Tensor:
    """[rows, frames - k, negatives] of one length under many keys: the valid predictions alone."""
    key_B = torch.arange(key, key + rows) * 0x1234567 - 99
    return draw(key_B, torch.full((rows,), frames), k, frames - k, negatives)


@given(
    key=st.integers(-(2**63), 2**63 - 1),
    frames=st.integers(2, 40),
    k=st.integers(1, 12),
    negatives=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
def test_the_positive_is_never_a_negative_and_every_negative_is_a_frame_of_the_utterance(key, frames, k, negatives):
    targets = max(1, frames - k)
    frames_BTN = draw(keys(key), keys(frames), k, targets, negatives)[0]
    assert frames_BTN.min() >= 0
    assert frames_BTN.max() < frames
    for t in range(frames - k):
        assert not (frames_BTN[t] == t + k).any()


def test_small_cases_equal_the_definition_written_out():
    for frames in range(2, 7):
        for k in range(1, frames):
            for key in (-7, 0, 2**62 + 3):
                fast = draw(keys(key), keys(frames), k, frames - k, 9)[0]
                slow = [[slow_draw(key, frames, k, t, n, 9) for n in range(9)] for t in range(frames - k)]
                assert fast.tolist() == slow


def test_every_other_frame_is_reached_and_only_those():
    for frames in range(2, 8):
        for k in range(1, frames):
            choices = drawn(frames, k, 40, rows=20)
            for t in range(frames - k):
                assert set(choices[:, t].flatten().tolist()) == set(range(frames)) - {t + k}


@pytest.mark.parametrize(("frames", "k"), [(5, 1), (30, 3), (128, 12)])
def test_every_other_frame_is_as_likely_as_the_next(frames, k):
    choices = drawn(frames, k, 50, rows=400)
    for t in (0, (frames - k) // 2, frames - k - 1):
        seen = np.bincount(choices[:, t].flatten().numpy(), minlength=frames)
        assert stats.chisquare(np.delete(seen, t + k)).pvalue > 1e-6


def test_draws_of_other_steps_frames_and_numbers_are_as_good_as_independent():
    """Two draws agree as often as chance has it, whatever place of one is laid over whatever place of the other."""
    frames, negatives, rows = 100, 20, 50
    by_step = [drawn(frames, k, negatives, rows)[:, : frames - 4] for k in (1, 2, 3, 4)]
    for k, here in enumerate(by_step):
        for other, there in enumerate(by_step):
            for shift in range(4):
                if k != other or shift:
                    agree = (here[:, :, shift:] == there[:, :, : negatives - shift]).float().mean().item()
                    assert agree < 0.02, f"k={k + 1} and k={other + 1} share draws at a shift of {shift}"
        assert (here[:, 1:] == here[:, :-1]).float().mean().item() < 0.02, "neighbouring frames share draws"


def test_more_negatives_than_frames_are_legal_and_drawn_with_replacement():
    choices = drawn(3, 1, 50, rows=4)
    assert choices.shape == (4, 2, 50)
    assert {tuple(sorted(set(row.tolist()))) for row in choices[:, 0]} == {(0, 2)}


def test_a_window_draws_the_same_in_any_batch():
    key_B, frames_B = keys(5, -6, 7, 8), keys(30, 12, 30, 21)
    whole = draw(key_B, frames_B, 2, 28, 10)
    order = torch.tensor([2, 0, 3])
    torch.testing.assert_close(draw(key_B[order], frames_B[order], 2, 28, 10), whole[order], rtol=0, atol=0)
    for row in range(4):
        alone = draw(key_B[row : row + 1], frames_B[row : row + 1], 2, 28, 10)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=0)


def test_padding_after_the_utterance_changes_no_draw():
    short = draw(keys(5), keys(12), 2, 10, 7)
    torch.testing.assert_close(draw(keys(5), keys(12), 2, 40, 7)[:, :10], short, rtol=0, atol=0)


def test_rows_without_frames_hold_numbers_that_can_be_gathered():
    for frames in (0, 1):
        assert draw(keys(5), keys(frames), 3, 6, 4).unique().tolist() == [0]


def test_the_draws_are_frozen():
    """A change of these values changes every run: it needs a new format of checkpoints, not a new golden value."""
    choices = draw(keys(1, -2), keys(128, 77), 12, 116, 50)
    assert choices[0, 0, :8].tolist() == [123, 48, 90, 108, 25, 10, 112, 68]
    assert choices[1, 64, :8].tolist() == [66, 67, 62, 19, 45, 14, 73, 58]
    assert (
        hashlib.sha256(choices.numpy().tobytes()).hexdigest()
        == "30df3c67129bd9b2934904a47992a2985dee12f6de0ef3fca5928461858a8b5f"
    )
