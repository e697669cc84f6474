"""Promises of tasks side by side: the same results, errors and bounds in local processes as on Ray."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from commands import long
from trees import corpus, noise, promised, write_tree

from cpcscale.cluster import session
from cpcscale.cluster.tasks import cpus_each, gpus_each, map_tasks, stream_tasks
from cpcscale.errors import AudioError, UserError
from cpcscale.machine import usable_cores
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.signals import ENDING

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


@pytest.fixture(scope="module", params=["processes", "Ray"], autouse=True)
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        if request.param == "Ray":
            patch.setenv("RAY_ADDRESS", "local")
            # Two GPUs that nobody has: Ray counts them as it counts others, and names them to processes.
            patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')
            session.connect()
        yield request.param
    if request.param == "Ray":
        sys.modules["ray"].shutdown()


def test_ray_is_used_where_it_is_asked_for_and_nowhere_else(where):
    assert session.uses_ray() == (where == "Ray")
    assert not session.joins_cluster()
    here = os.getpid()
    # Here every call is of a task whose process is another one.
    [name] = map_tasks(lambda number: psutil.Process().name(), range(1), what="names")
    assert name.startswith("ray") == (where == "Ray")
    assert map_tasks(lambda number: os.getpid(), range(1), what="ids") != [here]


def test_packing_side_by_side_gives_the_bytes_of_packing_in_turn(tmp_path, capsys):
    root = corpus(tmp_path / "audio")
    write_tree(root, {"s0/long.flac": noise(9, 77), "s0/bad.wav": b"no audio"})
    in_turn = pack(str(root), str(tmp_path / "in turn"), SPEC)
    there = pack(str(root), str(tmp_path / "there"), SPEC, stream_tasks)
    assert promised(tmp_path / "in turn") == promised(tmp_path / "there")
    assert there.quarantine == in_turn.quarantine != []
    said = capsys.readouterr().err
    assert "reading headers: 1/1 groups of files" in said
    assert "packing: " in said


def test_results_come_in_order_and_no_more_are_asked_for_than_are_under_way():
    items = Counted(200)
    most = max(8, 4 * usable_cores())

    def later_is_faster(number: int, factor: int) -> int:
        time.sleep(0.02 if number % 5 == 0 else 0)
        return number * factor

    for number, result in enumerate(stream_tasks(later_is_faster, items, what="products", shared=(3,))):
        assert result == 3 * number
        assert items.asked <= number + most
    assert number == 199
    # What is shared is that of this call, in the same process too.
    assert map_tasks(later_is_faster, range(3), what="products", shared=(5,)) == [0, 5, 10]
    assert map_tasks(later_is_faster, (), what="products", shared=(5,)) == []


def test_tasks_share_the_cores_of_this_machine_and_are_told_how_many_threads_they_have():
    cores = usable_cores()
    assert cpus_each(1) == cores
    assert cpus_each(4 * cores) == 0.25
    threads = map_tasks(lambda number: os.environ["OMP_NUM_THREADS"], range(1), what="threads", cpus=cores)
    assert threads == [os.environ.get("OMP_NUM_THREADS", str(cores))]


def test_a_pool_keeps_a_process_with_what_it_loaded_for_each_gpu_or_share_of_one(where, tmp_path):
    if where == "processes":
        pytest.skip("GPUs are of Ray")
    assert [gpus_each(workers) for workers in (0, 1, 2, 3, 4, 6, 14)] == [1, 1, 1, 0.5, 0.5, 0.3333, 0.1428]
    loaded, count = list[int](), 4

    def work(number: int, factor: int) -> tuple[int, int, str, int]:
        if number == 12:
            raise UserError("it is 12")
        loaded.append(number)
        # Until all processes of the pool have a task.
        (tmp_path / f"{os.getpid()}").touch()
        while len(list(tmp_path.iterdir())) < count:
            time.sleep(0.05)
        return factor * number, os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], len(loaded)

    results = stream_tasks(work, range(13), what="work", cpus=0.1, gpus=gpus_each(count), shared=(3,))
    found = list(itertools.islice(results, 12))
    assert [product for product, *_ in found] == [3 * number for number in range(12)]
    kept = {process: (gpu, most) for _, process, gpu, most in found}
    assert len(kept) == count and sum(most for _, most in kept.values()) == 12
    # Each has one GPU, the same for all its tasks.
    assert sorted(gpu for gpu, _ in kept.values()) == ["0", "0", "1", "1"]
    assert {(process, gpu) for _, process, gpu, _ in found} == {(each, kept[each][0]) for each in kept}
    with pytest.raises(UserError, match=r"^it is 12$"):
        next(results)


def test_a_users_mistake_in_a_task_is_raised_as_it_is_and_what_waits_is_cancelled(tmp_path):
    def work(number: int) -> int:
        if number == 1:
            raise AudioError("quiet", "it is quiet: take another one", 2.5)
        while number and not (tmp_path / "gate").exists():
            time.sleep(0.05)
        (tmp_path / f"{number}").write_text("done")
        return number

    results = stream_tasks(work, range(40), what="work")
    assert next(results) == 0
    with pytest.raises(AudioError, match=r"^it is quiet: take another one$") as caught:
        next(results)
    assert (caught.value.cause, caught.value.seconds, caught.value.__cause__) == ("quiet", 2.5, None)
    (tmp_path / "gate").write_text("open")
    # These come after all that was asked for before.
    map_tasks(lambda number: number, range(2 * usable_cores()), what="others")
    assert len(list(tmp_path.iterdir())) <= 2 + usable_cores()


def test_a_bug_in_a_task_keeps_its_traceback():
    def wrong(number: int) -> float:
        return 1 / number

    with pytest.raises(ZeroDivisionError) as caught:
        map_tasks(wrong, range(2), what="work")
    assert "return 1 / number" in f"{caught.value}{caught.value.__cause__}"


def test_a_signal_to_all_of_a_command_is_left_to_the_caller(where):
    [blocked] = map_tasks(lambda number: signal.pthread_sigmask(signal.SIG_BLOCK, ()), range(1), what="signals")
    # Ray ends its own processes at SIGTERM and SIGINT.
    assert blocked >= ({signal.SIGINT, *ENDING} if where == "processes" else {*ENDING} - {signal.SIGTERM})


def test_a_process_that_dies_is_one_line():
    def dying(number: int) -> None:
        os._exit(1)

    with pytest.raises(UserError, match=r"a process died at its task \(.+\): it may have run out of memory") as caught:
        map_tasks(dying, range(1), what="work")
    assert "\n" not in str(caught.value)
    assert map_tasks(abs, [-1], what="work") == [1]


def test_a_node_with_other_versions_or_without_a_package_is_one_line(where, tmp_path, monkeypatch):
    if where == "processes":
        pytest.skip("processes of this machine run the caller's own packages")
    (tmp_path / "only_here.py").write_text("def work(number):\n    return number\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    work = importlib.import_module("only_here").work
    with pytest.raises(UserError, match=r"^a node has no package only_here: install the same packages on every node$"):
        map_tasks(work, range(1), what="work")
    claimed = {**session.versions(), "torch": "9.9", "Python": "3.9"}
    monkeypatch.setattr(session, "versions", lambda: claimed)
    expected = rf"has Python \S+ and not 3.9, torch \S+ and not 9.9, .* \(its Python is {re.escape(sys.executable)}\)$"
    with pytest.raises(UserError, match=expected):
        map_tasks(abs, range(1), what="work")


# A script without a main guard.
SCRIPT = """
import pathlib, sys, time
from cpcscale.cluster.tasks import map_tasks

def work(number):
    print("a task prints nothing")
    pathlib.Path(sys.argv[1], str(number)).touch()
    time.sleep(1000)

map_tasks(work, range(8), what="work")
"""


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGTERM to all", marks=long)])
def test_tasks_end_with_the_process_that_asked_for_them(tmp_path, where, how):
    if where == "Ray":
        pytest.skip("Ray's processes: tests/drills/test_stop.py")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "began").mkdir()
    command = [sys.executable, str(script), str(tmp_path / "began")]
    caller = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not any((tmp_path / "began").iterdir()):
        assert caller.poll() is None, caller.stderr.read()
        time.sleep(0.05)
    started = psutil.Process(caller.pid).children(recursive=True)
    assert len(started) >= min(usable_cores(), 2)
    os.killpg(caller.pid, signal.SIGTERM) if how == "SIGTERM to all" else caller.kill()
    caller.wait(60)
    _, living = psutil.wait_procs(started, timeout=30)
    assert not living
    assert caller.stdout.read() == b""


def test_processes_serve_the_next_call_unless_it_is_made_elsewhere(where, tmp_path, monkeypatch):
    if where == "Ray":
        pytest.skip("Ray keeps its own processes")

    def seen(number: int) -> tuple[int, str, str]:
        return os.getpid(), str(Path.cwd()), os.environ.get("SEEN", "")

    [first], [second] = (map_tasks(seen, range(1), what="ids") for _ in range(2))
    assert first == second
    monkeypatch.chdir(tmp_path)
    [moved] = map_tasks(seen, range(1), what="ids")
    monkeypatch.setenv("SEEN", "set meanwhile")
    [changed] = map_tasks(seen, range(1), what="ids")
    assert len({first[0], moved[0], changed[0]}) == 3
    assert moved[1:] == (str(tmp_path), "") and changed[1:] == (str(tmp_path), "set meanwhile")
