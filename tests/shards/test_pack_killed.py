"""Promises of a pack that is killed: nothing half-written looks whole, and the next start cleans up after the dead."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from trees import contents, hidden, noise, promised, write_tree

from cpcscale.shards.index import MARKER
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.packing.folder_lock import FolderLock

SETTINGS = {"shard_mb": 0.1, "max_s": 1.0, "group_shards": 2}
SPEC = PackConfig(**SETTINGS)  # type: ignore[arg-type]
# Ends a pack in the middle of `function` of `module`, at its call number `at`: no handler runs.
KILLED = """
import os, signal
from cpcscale.shards import index_writer, pack
from cpcscale.shards.packing import write_tars
from cpcscale import storage

def dying(*arguments, **keywords):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **keywords)

calls, real = [], {module}.{function}
{module}.{function} = dying
pack.pack({source!r}, {target!r}, pack.PackConfig(**{settings!r}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    waves = {f"{n}.flac": noise(4 + n, seed=n) for n in range(5)}
    return write_tree(tmp_path_factory.mktemp("killed") / "audio", waves)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("killed") / "shards"
    pack(str(source), str(target), SPEC)
    return target


def kill(run_python, source: Path, target: Path, module: str, function: str, at: int) -> None:
    text = KILLED.format(
        module=module, function=function, at=at, source=str(source), target=str(target), settings=SETTINGS
    )
    status, lines = run_python(text)
    assert status == -signal.SIGKILL, lines


@pytest.mark.parametrize(
    ("module", "function", "at", "left"),
    [
        # In the first shard, in a later group's second, between the last shard and its note, in the index.
        ("write_tars", "scan", 1, ".shard-000000.tar."),
        ("write_tars", "scan", 4, ".shard-000003.tar."),
        ("write_tars", "_note", 2, ""),
        ("index_writer", "publish", 1, ""),
        ("storage", "remove", 1, ""),
    ],
)
def test_a_killed_pack_leaves_nothing_that_looks_whole_and_goes_on(
    source, undisturbed, tmp_path, run_python, module, function, at, left
):
    kill(run_python, source, tmp_path, module, function, at)
    assert any(left in name for name in hidden(tmp_path)) or not left
    assert {*promised(tmp_path)} - {"train/index.json"} < {*promised(undisturbed)}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    good = contents(undisturbed)
    for path in written:
        assert contents(tmp_path)[str(path.relative_to(tmp_path))] == good[str(path.relative_to(tmp_path))]
    pack(str(source), str(tmp_path), SPEC)
    assert promised(tmp_path) == promised(undisturbed)
    assert hidden(tmp_path) == []
    assert len(list(tmp_path.rglob("part-*"))) == 1
    assert {path: path.stat().st_mtime_ns for path in written} == written


def stale(target: Path) -> list[Path]:
    """What a killed pack could have left, and two files that are somebody else's."""
    names = [".shard-000001.tar.0123abcd.tmp", "utterances/.part-00000-0123abcd.parquet.0123abcd.tmp"]
    names += ["utterances/part-00000-0123abcd.parquet", ".mine.tmp", ".shard-000001.tar.0123abcd.tmp.bak"]
    paths = [target / "train" / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    return paths


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack that ended after its assignment."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cpcscale.shards.pack._pack_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            pack(str(source), str(target), SPEC)


def test_only_what_packs_leave_is_removed(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path, monkeypatch)
    paths = stale(tmp_path)
    pack(str(source), str(tmp_path), SPEC)
    assert [path.exists() for path in paths] == [False, False, False, True, True]


def test_files_of_a_pack_that_is_still_at_work_are_left_alone_unless_untouched_for_a_day(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path, monkeypatch)
    with FolderLock(tmp_path) as other:
        other.share()
        paths = stale(tmp_path)
        pack(str(source), str(tmp_path), SPEC)
        assert all(path.exists() for path in paths)
        yesterday = time.time() - 90_000
        for path in paths:
            os.utime(path, (yesterday, yesterday))
        with FolderLock(tmp_path) as third:
            third.clean(["train"], MARKER)
        # The marker is there now, so that a part may belong to a version that a run has open.
        assert [path.exists() for path in paths] == [False, False, True, True, True]


def test_two_packs_at_once_give_the_one_set(source, undisturbed, tmp_path, run_python):
    text = f"""
import threading
from cpcscale.shards import pack
ends = []
def work():
    pack.pack({str(source)!r}, {str(tmp_path)!r}, pack.PackConfig(**{SETTINGS!r}))
    ends.append(1)
threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(ends) == 3
"""
    status, lines = run_python(text)
    assert status == 0, lines
    assert promised(tmp_path) == promised(undisturbed)
    assert not list(tmp_path.rglob(".*.tmp"))
