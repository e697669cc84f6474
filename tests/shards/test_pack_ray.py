"""Promises of packing on Ray: what packing here gives, a bounded number of tasks under way, and errors as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from trees import corpus, noise, promised, write_tree

from cpcscale import progress
from cpcscale.cluster import session
from cpcscale.cluster import shard_tasks as on_ray
from cpcscale.errors import UserError
from cpcscale.shards.pack import PackConfig, pack

SPEC = PackConfig(shard_mb=0.1, max_s=1.0, heldout_share=0.2, group_shards=2)


class Counted(Sequence[int]):
    """Numbers below `count`, and the highest that was asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, -1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> int:  # type: ignore[override]
        self.asked = max(self.asked, at)
        return at


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> None:
    session.connect()


def test_packing_on_ray_gives_the_same_bytes(tmp_path, capsys):
    root = corpus(tmp_path / "audio")
    write_tree(root, {"s0/long.flac": noise(9, 77), "s0/bad.wav": b"no audio"})
    here = pack(str(root), str(tmp_path / "here"), SPEC)
    there = on_ray.pack(str(root), str(tmp_path / "there"), SPEC)
    assert promised(tmp_path / "here") == promised(tmp_path / "there")
    assert there.quarantine == here.quarantine != []
    said = capsys.readouterr().err
    assert "reading headers: 1/1 groups of files" in said
    assert "packing: " in said


def test_results_come_in_order_and_no_more_are_asked_for_than_are_under_way():
    import ray

    items = Counted(200)
    most = max(8, 4 * int(ray.cluster_resources()["CPU"]))

    def later_is_faster(number: int) -> int:
        time.sleep(0.02 if number % 5 == 0 else 0)
        return number * number

    for number, result in enumerate(session.stream_tasks(later_is_faster, items, what="squares")):
        assert result == number * number
        assert items.asked <= number + most
    assert number == 199
    assert session.map_tasks(later_is_faster, range(3), what="squares") == [0, 1, 4]


def test_a_users_mistake_in_a_task_is_raised_as_it_is_and_what_waits_is_cancelled(tmp_path):
    import ray

    def work(number: int) -> int:
        if number == 1:
            raise UserError("the disk is full: free some")
        while number and not (tmp_path / "gate").exists():
            time.sleep(0.05)
        (tmp_path / f"{number}").write_text("done")
        return number

    results = session.stream_tasks(work, range(40), what="work")
    assert next(results) == 0
    with pytest.raises(UserError, match=r"^the disk is full: free some$"):
        next(results)
    (tmp_path / "gate").write_text("open")
    cores = int(ray.cluster_resources()["CPU"])
    # These come after all that was asked for before.
    session.map_tasks(lambda number: number, range(2 * cores), what="others")
    assert len(list(tmp_path.iterdir())) <= 2 + cores


def test_a_worker_that_dies_again_and_again_is_one_line():
    def dying(number: int) -> Any:
        import os

        os._exit(1)

    with pytest.raises(UserError, match="a worker process died") as caught:
        session.map_tasks(dying, range(1), what="work")
    assert "\n" not in str(caught.value)


def test_the_time_left_follows_the_speed_of_late_and_not_what_was_done_before(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress.Progress("packing", 1000, "shards")
    # A hundred are found done at once, then each takes a minute.
    for done in range(1, 200):
        clock[0] += 60 if done > 100 else 0
        bar.update(done)
    assert capsys.readouterr().err.splitlines()[-1] == "packing: 199/1000 shards, about 13 h 21 min left"
    assert [progress.duration(seconds) for seconds in (0.4, 89, 90, 5340, 36_000)] == [
        "0 s",
        "89 s",
        "2 min",
        "89 min",
        "10 h 00 min",
    ]
