import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from cpcscale.objective.negatives import Scope, draw_each, draw_shared

_MASK = (1 << 64) - 1
Draw = Callable[[Tensor, Tensor, int, int, int], Tensor]


def splitmix(key: int, value: int) -> int:
    """Steele et al. 2014, on Python's unbounded integers."""
    state = (key + (value + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def choice(bits: int, among: list[int]) -> int:
    return among[((bits & 0x7FFFFFFF) * len(among)) >> 31]


def slow_each(key: int, size: int, positive: int, k: int, t: int, negatives: int) -> list[int]:
    """The definition, one negative at a time: a keyed choice among all frames of the scope but the positive."""
    others = [frame for frame in range(size) if frame != positive]
    step_key = splitmix(key & _MASK, k)
    return [choice(splitmix(step_key, t * negatives + number), others) for number in range(negatives)]


def slow_shared(key: int, size: int, positive: int, k: int, negatives: int) -> list[int]:
    """What frame t compares with where all share: the same keyed choices, a spare one where this is the positive."""
    step_key, compared = splitmix(key & _MASK, k), []
    for number in range(negatives):
        frame = choice(splitmix(step_key, number), list(range(size)))
        others = [other for other in range(size) if other != frame]
        spare = choice(splitmix(step_key, negatives + number), others)
        compared.append(spare if frame == positive else frame)
    return compared


def keys(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def draw(key_B: Tensor, frames_B: Tensor, k: int, targets: int, negatives: int) -> Tensor:
    """`draw_each`, every row from its own frames."""
    return draw_each(key_B, Scope.of_rows(frames_B, k + targets), k, targets, negatives)


def compared(key_B: Tensor, scope: Scope, k: int, targets: int, negatives: int) -> Tensor:
    """[B, targets, N]: what every prediction compares with under `draw_shared`."""
    number_BN, spare_BN = draw_shared(key_B, scope, k, negatives)
    positive_BT1 = (scope.own_B.unsqueeze(1) + torch.arange(k, k + targets)).unsqueeze(2)
    return torch.where(number_BN.unsqueeze(1) == positive_BT1, spare_BN.unsqueeze(1), number_BN.unsqueeze(1))


def shared_draw(key_B: Tensor, frames_B: Tensor, k: int, targets: int, negatives: int) -> Tensor:
    return compared(key_B, Scope.of_rows(frames_B, k + targets), k, targets, negatives)


DRAWS = [draw, shared_draw]


def drawn(frames: int, k: int, negatives: int, rows: int, way: Draw = draw) -> Tensor:
    """[rows, frames - k, negatives] of one length under many keys: the valid predictions alone."""
    key_B = torch.arange(rows) * 0x1234567 - 99
    return way(key_B, torch.full((rows,), frames), k, frames - k, negatives)


@given(
    key=st.integers(-(2**63), 2**63 - 1),
    frames=st.integers(2, 40),
    k=st.integers(1, 12),
    negatives=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("way", DRAWS)
def test_the_positive_is_never_a_negative_and_every_negative_is_a_frame_of_the_utterance(
    way, key, frames, k, negatives
):
    targets = max(1, frames - k)
    frames_BTN = way(keys(key), keys(frames), k, targets, negatives)[0]
    assert frames_BTN.min() >= 0
    assert frames_BTN.max() < frames
    for t in range(frames - k):
        assert not (frames_BTN[t] == t + k).any()


def test_small_cases_equal_the_definition_written_out():
    for frames in range(2, 7):
        for k in range(1, frames):
            for key in (-7, 0, 2**62 + 3):
                targets = range(frames - k)
                fast = draw(keys(key), keys(frames), k, frames - k, 9)[0]
                assert fast.tolist() == [slow_each(key, frames, t + k, k, t, 9) for t in targets]
                fast = shared_draw(keys(key), keys(frames), k, frames - k, 9)[0]
                assert fast.tolist() == [slow_shared(key, frames, t + k, k, 9) for t in targets]


@pytest.mark.parametrize("way", DRAWS)
def test_every_other_frame_is_reached_and_only_those(way):
    for frames in range(2, 8):
        for k in range(1, frames):
            choices = drawn(frames, k, 40, rows=20, way=way)
            for t in range(frames - k):
                assert set(choices[:, t].flatten().tolist()) == set(range(frames)) - {t + k}


@pytest.mark.parametrize("way", DRAWS)
@pytest.mark.parametrize(("frames", "k"), [(5, 1), (30, 3), (128, 12)])
def test_every_other_frame_is_as_likely_as_the_next(way, frames, k):
    choices = drawn(frames, k, 50, rows=400, way=way)
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


@pytest.mark.parametrize("way", DRAWS)
def test_more_negatives_than_frames_are_legal_and_drawn_with_replacement(way):
    choices = drawn(3, 1, 50, rows=4, way=way)
    assert choices.shape == (4, 2, 50)
    assert {tuple(sorted(set(row.tolist()))) for row in choices[:, 0]} == {(0, 2)}


@pytest.mark.parametrize("way", DRAWS)
def test_a_window_draws_the_same_in_any_batch(way):
    key_B, frames_B = keys(5, -6, 7, 8), keys(30, 12, 30, 21)
    whole = way(key_B, frames_B, 2, 28, 10)
    order = torch.tensor([2, 0, 3])
    torch.testing.assert_close(way(key_B[order], frames_B[order], 2, 28, 10), whole[order], rtol=0, atol=0)
    for row in range(4):
        alone = way(key_B[row : row + 1], frames_B[row : row + 1], 2, 28, 10)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=0)


def test_padding_after_the_utterance_changes_no_draw():
    short = draw(keys(5), keys(12), 2, 10, 7)
    torch.testing.assert_close(draw(keys(5), keys(12), 2, 40, 7)[:, :10], short, rtol=0, atol=0)


@pytest.mark.parametrize("way", DRAWS)
def test_rows_without_frames_hold_numbers_that_can_be_gathered(way):
    for frames in (0, 1):
        scope = Scope.of_rows(keys(frames), 9)
        places = scope.flat(way(keys(5), keys(frames), 3, 6, 4))
        assert 0 <= places.min() <= places.max() < 9


FRAMES_R = (5, 0, 3, 8, 1, 4, 0, 8)
KEY_R = (40, -3, 7, 2**62, -(2**61), 8, 90, -1)
LABEL_R = (1, 1, 2, 1, 2, 2, -5, 1)


def members(row: int, labels: tuple[int, ...] = LABEL_R) -> list[tuple[int, int]]:
    """The scope of a row written out: (row, frame) of all windows of its label in the order of their keys."""
    rows = sorted((each for each in range(len(labels)) if labels[each] == labels[row]), key=lambda each: KEY_R[each])
    return [(each, frame) for each in rows for frame in range(FRAMES_R[each])]


@pytest.mark.parametrize("labels", [LABEL_R, (0,) * 8, tuple(range(8))])
@pytest.mark.parametrize("own", [slice(0, 8), slice(2, 6), slice(7, 8), slice(1, 2)])
def test_a_scope_numbers_the_frames_of_its_windows_in_the_order_of_their_keys(labels, own):
    scope = Scope.of_pool(keys(*FRAMES_R), keys(*KEY_R), keys(*labels), 8, own)
    for place, row in enumerate(range(*own.indices(8))):
        frames = members(row, labels)
        assert scope.size_B[place] == len(frames)
        if FRAMES_R[row]:
            assert frames[scope.own_B[place]] == (row, 0)
        numbers = torch.arange(len(frames)).unsqueeze(0)
        assert scope[place : place + 1].flat(numbers)[0].tolist() == [there * 8 + frame for there, frame in frames]


def test_wide_draws_equal_the_definition_written_out():
    scope = Scope.of_pool(keys(*FRAMES_R), keys(*KEY_R), keys(*LABEL_R), 8, slice(0, 8))
    for k in (1, 2, 4):
        fast, together = draw_each(keys(*KEY_R), scope, k, 8 - k, 7), compared(keys(*KEY_R), scope, k, 8 - k, 7)
        for row in range(8):
            for t in range(FRAMES_R[row] - k):
                frames = members(row)
                positive = frames.index((row, t + k))
                assert fast[row, t].tolist() == slow_each(KEY_R[row], len(frames), positive, k, t, 7)
                assert together[row, t].tolist() == slow_shared(KEY_R[row], len(frames), positive, k, 7)


def test_wide_draws_do_not_depend_on_the_layout_of_the_pool():
    order = torch.tensor([6, 2, 0, 7, 5, 1, 3, 4])
    parts = keys(*FRAMES_R), keys(*KEY_R), keys(*LABEL_R)
    scope, other = (Scope.of_pool(*(part[at] for part in parts), 8, slice(0, 8)) for at in (torch.arange(8), order))
    # Where a frame of the reordered pool stood before.
    before = order[torch.arange(64) // 8] * 8 + torch.arange(64) % 8
    drawn = scope.flat(draw_each(parts[1], scope, 2, 6, 9))[order]
    again = before[other.flat(draw_each(parts[1][order], other, 2, 6, 9))]
    real = (torch.arange(6) + 2).unsqueeze(0) < parts[0][order].unsqueeze(1)
    assert torch.equal(drawn[real], again[real])


ALONE_R = (0, 0, 0, 8, 0, 0, 0, 0)


def slow_mixed(key: int, row: int, frames: tuple[int, ...], k: int, t: int, negatives: int, way: Draw) -> list[int]:
    """The numbers in the scope that a prediction of frame t + k compares with, one keyed choice at a time."""
    numbered = [
        (each, frame) for each in sorted(range(8), key=lambda each: KEY_R[each]) for frame in range(frames[each])
    ]
    first = numbered.index((row, 0))
    # From the row's own first frame on, and round.
    turned = [*range(first, len(numbered)), *range(first)]
    own, others = turned[: frames[row]], turned[frames[row] :]
    step_key, drawn = splitmix(key & _MASK, k), []
    for number in range(negatives):
        among = own if number < -(-negatives // 2) or not others else others
        without = [frame for frame in among if frame != first + t + k]
        if way is draw_each:
            drawn.append(choice(splitmix(step_key, t * negatives + number), without))
            continue
        frame = choice(splitmix(step_key, number), among)
        spare = choice(splitmix(step_key, negatives + number), [other for other in among if other != frame] or among)
        drawn.append(spare if frame == first + t + k else frame)
    return drawn


@pytest.mark.parametrize("frames", [FRAMES_R, ALONE_R])
@pytest.mark.parametrize("way", [draw_each, compared])
@pytest.mark.parametrize("negatives", [1, 6, 7])
def test_mixed_draws_equal_the_definition_written_out_and_never_hold_the_positive(way, frames, negatives):
    scope = Scope.of_pool(keys(*frames), keys(*KEY_R), keys(*[0] * 8), 8, slice(0, 8), mixed=True)
    for k in (1, 2, 4):
        fast = way(keys(*KEY_R), scope, k, 8 - k, negatives)
        places = scope.flat(fast)
        assert torch.equal(scope[3:4].flat(fast[3:4])[0], places[3])
        for row in range(8):
            for t in range(frames[row] - k):
                assert fast[row, t].tolist() == slow_mixed(KEY_R[row], row, frames, k, t, negatives, way)
                assert row * 8 + t + k not in places[row, t]
                own = (places[row, t] // 8 == row).sum().item()
                assert own == (negatives if frames is ALONE_R else -(-negatives // 2))
                assert all(frames[place // 8] > place % 8 for place in places[row, t].tolist())


def test_the_draws_are_frozen():
    """A change of these values changes every run: it needs a new format of checkpoints, not a new golden value."""
    choices = draw(keys(1, -2), keys(128, 77), 12, 116, 50)
    assert choices[0, 0, :8].tolist() == [123, 48, 90, 108, 25, 10, 112, 68]
    assert choices[1, 64, :8].tolist() == [66, 67, 62, 19, 45, 14, 73, 58]
    assert (
        hashlib.sha256(choices.numpy().tobytes()).hexdigest()
        == "30df3c67129bd9b2934904a47992a2985dee12f6de0ef3fca5928461858a8b5f"
    )
    together = shared_draw(keys(1, -2), keys(128, 77), 12, 116, 50)
    assert together[0, 0, :8].tolist() == [123, 47, 90, 107, 24, 11, 112, 67]
    assert (
        hashlib.sha256(together.numpy().tobytes()).hexdigest()
        == "56272d93cb93f641219f8a835cc3ccf048a520ddad759240b2b8e31c267e8a96"
    )
