"""Promises of reading ahead: in order, a bounded number of items alive, and what fails in a thread fails the reader."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.emotion.audio.prefetch import SelectedRows, flatten_windows, map_in_chunks, read_ahead
from cpcscale.errors import UserError


@given(count=st.integers(0, 40), ahead=st.integers(1, 9))
def test_results_come_in_order_and_few_are_ahead_of_the_reader(count, ahead):
    begun: list[int] = []
    results = read_ahead(lambda number: 2 * number, (begun.append(number) or number for number in range(count)), ahead)
    got = []
    for result in results:
        got.append(result)
        assert len(begun) <= len(got) + ahead - 1
    assert got == [2 * number for number in range(count)]


def test_what_a_thread_fails_of_is_raised_in_its_turn():
    def read(number: int) -> int:
        if number == 3:
            raise UserError("the shard is gone")
        return number

    results = read_ahead(read, range(9), 8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="the shard is gone"):
        next(results)


def test_windows_of_many_utterances_are_never_alive_together():
    alive, most = list[int](), 0

    class Decoded(list):
        def __getitem__(self, row: int) -> tuple[np.ndarray, ...]:
            windows = tuple(np.full(3, number) for number in (2 * row, 2 * row + 1))
            for window in windows:
                alive.append(1)
                weakref.finalize(window, alive.pop)
            return windows

    heard = []
    for window in flatten_windows(Decoded(range(1000))):
        heard.append(int(window[0]))
        most = max(most, len(alive))
    assert heard == list(range(2000))
    assert most < 200


@given(count=st.integers(0, 30), size=st.integers(1, 7))
def test_chunks_give_what_all_at_once_gives(count, size):
    sizes = []

    def compute(chunk: list[int]) -> list[int]:
        sizes.append(len(chunk))
        return [number + 1 for number in chunk]

    assert list(map_in_chunks(compute, iter(range(count)), size)) == list(range(1, count + 1))
    assert all(number == size for number in sizes[:-1]) and all(0 < number <= size for number in sizes)


def test_picked_rows_are_taken_when_they_are_asked_for():
    asked = []

    class Asked(list):
        def __getitem__(self, row: int) -> int:
            asked.append(row)
            return super().__getitem__(row)

    rows = SelectedRows(Asked("abcdef"), [5, 0, 3])
    assert len(rows) == 3 and asked == []
    assert rows[1:][1] == "d" and asked == [3]
    assert list(rows) == ["f", "a", "d"]
