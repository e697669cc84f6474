"""One live driver a run, on a disk and in a store: who is refused, who is waited for, and who is told to stop."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoints
import pytest

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.runs import lease
from cpcscale.runs import ledger as ledger_module
from cpcscale.runs.ledger import Ledger, OvertakenError, RunHolder

# Short, for holders elsewhere are waited for.
SPEC = lease.LeaseConfig(ttl_s=1.0)


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder, once on disk and once in the store."""
    if request.param == "local":
        return str(tmp_path / "run")
    return storage.join(request.getfixturevalue("s3").base, tmp_path.name)


def held(run: str, *, take_over: bool = False, say=print) -> contextlib.AbstractContextManager[lease.Lease]:
    return lease.hold(run, SPEC, take_over=take_over, say=say)


def elsewhere(run: str, **changes: object) -> RunHolder:
    """A holder on another machine has this run. Its time is long: on a busy machine, so may a look be."""
    changes = {"ttl_s": 60.0, **changes}
    holder = dataclasses.replace(lease.new_holder(SPEC), host="node7", machine="another", **changes)
    ledger = Ledger(run)
    assert ledger.advance(ledger.head().taken(holder))
    return holder


@contextlib.contextmanager
def signs(run: str, holder: RunHolder, every_s: float = 0.1) -> Iterator[None]:
    """The holder gives signs of life during the block."""
    over = threading.Event()

    def sign() -> None:
        number = 0
        while not over.wait(every_s):
            number += 1
            storage.write(storage.join(run, "ledger", f"alive-{holder.id}.json"), str(number).encode())

    thread = threading.Thread(target=sign)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def refusal(run: str, **options: object) -> str:
    with pytest.raises(lease.HeldError) as caught, held(run, **options):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def alive_files(run: str) -> list[str]:
    return [name for name in storage.list_files(storage.join(run, "ledger")) if name.startswith("alive-")]


def test_a_second_start_of_a_live_run_is_refused_with_pid_host_age_and_the_way_out(run):
    with held(run) as first:
        before = storage.list_files(run)
        line = refusal(run)
        assert storage.list_files(run) == before
        assert Ledger(run).head().is_of(first.id)
    assert f"is held by pid {os.getpid()} on {socket.gethostname()} (since " in line
    assert re.search(r"\(since \d+ s\), which is alive: stop it, name another run_dir, or give --take-over", line)


def test_a_run_that_was_given_back_is_free_at_once_however_its_block_ended(run):
    with held(run):
        pass
    with contextlib.suppress(UserError), held(run):
        raise UserError("a mistake")
    with contextlib.suppress(KeyboardInterrupt), held(run):
        raise KeyboardInterrupt
    with held(run, say=lambda text: pytest.fail(text)) as last:
        assert Ledger(run).head().is_of(last.id)
        assert alive_files(run) == [f"alive-{last.id}.json"]
    assert not Ledger(run).head().held
    assert alive_files(run) == []


def test_to_ask_whether_a_run_is_free_writes_nothing(tmp_path):
    lease.wait_until_free(Ledger(str(tmp_path / "run")), take_over=False, say=print)
    assert not (tmp_path / "run").exists()


def test_of_many_that_start_at_once_exactly_one_holds_the_run(run):
    ready, done = threading.Barrier(6), threading.Barrier(6)

    def start(_: int) -> str | None:
        ready.wait()
        with contextlib.ExitStack() as stack:
            try:
                got = stack.enter_context(held(run)).id
            except lease.HeldError:
                got = None
            done.wait()
            assert got is None or Ledger(run).head().is_of(got)
            done.wait()
            return got

    with ThreadPoolExecutor(6) as pool:
        assert sum(got is not None for got in pool.map(start, range(6))) == 1


HOLDING = """
import sys, time
from cpcscale.runs.lease import LeaseConfig, hold
with hold(sys.argv[1], LeaseConfig(), take_over=False, say=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def process(run) -> Iterator[subprocess.Popen]:
    """Another process of this machine that holds the run."""
    started = subprocess.Popen([sys.executable, "-c", HOLDING, run], stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "held\n"
    yield started
    started.kill()
    started.wait()


def test_a_holder_that_was_killed_on_this_machine_is_replaced_at_once_and_a_stopped_one_is_not(run, process):
    os.kill(process.pid, signal.SIGSTOP)
    assert f"pid {process.pid} " in refusal(run)
    process.kill()
    # It is dead before anybody has asked how it ended.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with held(run, say=lambda text: pytest.fail(text)) as mine:
        assert alive_files(run) == [f"alive-{mine.id}.json"]


def test_a_process_that_has_the_number_of_a_dead_holder_is_not_taken_for_it(run):
    ledger = Ledger(run)
    other = dataclasses.replace(lease.new_holder(SPEC), started="1")
    assert ledger.advance(ledger.head().taken(other))
    with held(run, say=lambda text: pytest.fail(text)):
        pass


def test_a_holder_elsewhere_that_gives_no_sign_of_life_is_replaced_after_its_time_with_a_line(run):
    holder = elsewhere(run, since_s=time.time() + 9e9, ttl_s=1.0)
    said = []
    with held(run, say=said.append) as mine:
        assert Ledger(run).head().is_of(mine.id)
    [line] = said
    assert f"is held by pid {holder.pid} on node7" in line
    assert "waiting up to 1 s for a sign of life" in line


def test_a_holder_elsewhere_that_gives_signs_of_life_is_not_replaced_whatever_its_clock_says(run):
    holder = elsewhere(run, since_s=0.0)
    with signs(run, holder):
        assert "on node7" in refusal(run)


def test_the_time_of_a_holder_is_its_own(run):
    """A start with a shorter one must not take a slower holder for dead."""
    holder = elsewhere(run)
    with signs(run, holder, every_s=2.5 * SPEC.ttl_s):
        assert "which is alive" in refusal(run)


def test_a_holder_elsewhere_that_gives_the_run_back_is_not_waited_for_any_longer(run):
    elsewhere(run, ttl_s=3600.0)
    ledger = Ledger(run)

    def give_back(_: str) -> None:
        assert ledger.advance(ledger.head().released())

    with held(run, say=give_back) as mine:
        assert ledger.head().is_of(mine.id)


def test_take_over_asks_nobody(run):
    holder = elsewhere(run)
    with signs(run, holder), held(run, take_over=True, say=lambda text: pytest.fail(text)) as mine:
        assert Ledger(run).head().is_of(mine.id)


def test_a_holder_that_is_overtaken_is_interrupted_and_says_by_whom(run):
    begun = time.monotonic()
    with (
        pytest.raises(OvertakenError, match=r"was taken over by pid \d+ on node7 .*: this one stops") as end,
        held(run),
    ):
        new = elsewhere(run)
        while time.monotonic() - begun < 60:
            time.sleep(0.01)
    assert "\n" not in str(end.value)
    assert Ledger(run).head().is_of(new.id), "it gives back nothing that is not its own"


def test_whatever_breaks_in_a_block_that_was_overtaken_the_line_is_that_it_was(run):
    with pytest.raises(OvertakenError, match="on node7"), held(run):
        elsewhere(run)
        raise RuntimeError("the cluster is gone")


def test_a_holder_knows_that_it_was_overtaken_when_it_asks(run):
    with pytest.raises(OvertakenError), held(run) as mine:
        assert mine.held(now=True)
        # Its own workers publish meanwhile.
        checkpoint = checkpoints.position(4)
        ledger = Ledger(run)
        publisher = checkpoints.Publisher(ledger, ledger.head(), 0, keep=2, holder=mine.id)
        publisher.publish(checkpoint.step, None, {"state.json": b"{}"})
        assert mine.held(now=True)
        elsewhere(run)
        assert not mine.held(now=True)
        raise KeyboardInterrupt


def test_a_run_without_a_lease_is_taken_from_its_holder(run):
    with pytest.raises(OvertakenError, match="by another process"), held(run) as mine:
        checkpoints.publish(run, checkpoints.position(4))
        assert not mine.held(now=True)
        raise KeyboardInterrupt


def test_giving_back_clears_what_the_workers_left_half_written(tmp_path):
    with held(str(tmp_path / "run")) as mine:
        ledger = Ledger(str(tmp_path / "run"))
        checkpoints.Publisher(ledger, ledger.head(), 0, keep=2, holder=mine.id)
        half = (
            tmp_path / "run" / "checkpoints" / f"step-00000004-{ledger.head().writer:04d}" / ".model.safetensors.0.tmp"
        )
        half.parent.mkdir(parents=True)
        half.write_bytes(b"half")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


NOTHING = b"<?xml version='1.0'?><ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"


def test_a_store_that_lists_late_is_waited_for_and_the_run_is_taken_once(faulty_s3):
    run = storage.join(faulty_s3.base, "run")
    for held_before in (False, True):
        # The listings before the entry is made show what is there, and those after it do not at first.
        fault = faulty_s3.fail("reply", times=4, method="GET", path="/ledger/", status=200, body=NOTHING)
        with held(run) as first:
            assert Ledger(run).head().is_of(first.id)
        assert fault.struck == 4
        assert Ledger(run).head().number == (4 if held_before else 2)


@pytest.mark.parametrize("fault", ["never listed", "listed under another name", "folded by the store", "bucket gone"])
def test_a_store_in_which_nothing_changes_ends_in_one_line_that_says_what_it_does(faulty_s3, monkeypatch, fault):
    monkeypatch.setattr(ledger_module, "_LATE_S", 0.5)
    run = storage.join(faulty_s3.base, "run")
    if fault == "never listed":
        faulty_s3.fail("reply", method="GET", path="list-type", status=200, body=NOTHING)
        words = "has entry 1 and does not list it"
    elif fault == "listed under another name":
        key = f"{run.removeprefix('s3://speech/')}/ledger/00000001.json"
        listing = f"<ListBucketResult><Contents><Key>{key}</Key><Size>9</Size></Contents></ListBucketResult>"
        faulty_s3.fail("reply", method="GET", path="list-type", status=200, body=listing.encode())
        words = "lists entries that cannot be read"
    elif fault == "folded by the store":  # SeaweedFS keeps `a\\b` as `a/b`.
        run, words = f"{run}\\b", "has entry 1 and does not list it"
    else:
        run, words = "s3://no-such-bucket/run", "NoSuchBucket"
    for _ in range(2):
        with pytest.raises(UserError, match=words) as caught, held(run):
            pass
        assert "\n" not in str(caught.value)
        assert run in str(caught.value)
