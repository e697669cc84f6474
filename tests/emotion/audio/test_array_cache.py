"""Promises of the cache of arrays: never another value than was made, whatever is torn, evicted or killed."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nst
from safetensors.numpy import load_file

from cpcscale.emotion.audio import array_cache
from cpcscale.emotion.audio.array_cache import ArrayCache, AudioCacheConfig, CachedArrays, cache_kind
from cpcscale.errors import UserError

ARRAYS = nst.arrays(
    st.sampled_from([np.int16, np.int64, np.float16, np.float32, np.float64]),
    nst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)
# A process that adds an array of a megabyte after it said so, and dies with half of it written.
DYING = """
import sys, time
from pathlib import Path
import numpy as np
from cpcscale.emotion.audio import array_cache

def half(arrays, path, checksums):
    Path(path).write_bytes(bytes(500_000))
    print("half", flush=True)
    time.sleep(600)

array_cache.save_file = half
with array_cache.ArrayCache(array_cache.AudioCacheConfig(path=sys.argv[1])).writer("a") as writer:
    writer.add("one", np.zeros(500_000, np.int16))
"""
# A process that makes what it does not find, says what it made, and keeps others waiting until it is told to go on.
MAKING = """
import sys
import numpy as np
from cpcscale.emotion.audio import array_cache

kept = array_cache.ArrayCache(array_cache.AudioCacheConfig(path=sys.argv[1]))
print("begun", flush=True)
with kept.writer("a") as writer:
    for number in range(200):
        if str(number) not in writer.arrays:
            writer.add(str(number), np.full(1000, number, np.int16))
            print(number)
    print("added", flush=True)
    sys.stdin.readline()
held = kept.arrays("a")
assert all((held.read(str(number), lambda: None) == number).all() for number in range(200))
"""
# Long enough for a process that does not wait to end.
PATIENCE_S = 3


def opened(folder: Path, limit_bytes: float = 1e9) -> ArrayCache:
    return ArrayCache(AudioCacheConfig(path=str(folder), limit_gb=limit_bytes / 1e9))


def fill(kept: ArrayCache, what: str, arrays: dict[str, np.ndarray]) -> CachedArrays:
    with kept.writer(what) as writer:
        for key, array in arrays.items():
            writer.add(key, array)
    return writer.arrays


def never() -> np.ndarray:
    raise AssertionError("an array that the cache has was made again")


def packs(folder: Path, what: str = "*") -> list[Path]:
    return sorted(folder.glob(f"emotion/{what}/*.safetensors"))


def process(text: str, folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", text, str(folder)], stdin=pipe, stdout=pipe, text=True)


@given(arrays=st.dictionaries(st.text("0123456789abcdef.", min_size=1), ARRAYS, max_size=5))
def test_what_comes_out_is_what_went_in(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    fill(opened(folder), "a", arrays)
    held = opened(folder).arrays("a")
    assert len(held) == len(arrays)
    for key, array in arrays.items():
        got = held.read(key, never)
        assert (got.dtype, got.shape, held.shape(key)) == (array.dtype, array.shape, array.shape)
        np.testing.assert_array_equal(got, array)


def test_an_array_is_mapped_and_not_for_writing(tmp_path):
    fill(opened(tmp_path), "a", {"one": np.arange(6.0)})
    array = opened(tmp_path).arrays("a").read("one", never)
    assert isinstance(array.base, mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_a_pack_is_a_safetensors_file_that_others_read(tmp_path):
    arrays = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.arange(5, dtype=np.int16)}
    fill(opened(tmp_path), "a", arrays)
    (pack,) = packs(tmp_path)
    for key, array in load_file(pack).items():
        np.testing.assert_array_equal(array, arrays[key])


def test_an_array_is_taken_as_it_is_when_it_is_added(tmp_path):
    buffer_TC = np.arange(12, dtype=np.float32).reshape(3, 4)
    with opened(tmp_path).writer("a") as writer:
        writer.add("part", buffer_TC[:, 1:3])
        buffer_TC[:] = 0
    np.testing.assert_array_equal(opened(tmp_path).arrays("a").read("part", never), [[1, 2], [5, 6], [9, 10]])


@pytest.mark.parametrize("place", [0, 7, 8, 20, 60, -1])
def test_a_garbled_pack_gives_no_wrong_array_and_is_removed(place, tmp_path, caplog):
    array = np.arange(1000, dtype=np.float32)
    fill(opened(tmp_path), "a", {"one": array})
    (pack,) = packs(tmp_path)
    data = bytearray(pack.read_bytes())
    data[place] ^= 0x15
    pack.write_bytes(data)
    held = opened(tmp_path).arrays("a")
    if "one" in held:
        np.testing.assert_array_equal(held.read("one", array.copy), array)
        np.testing.assert_array_equal(held.read("one", never), array)
    assert packs(tmp_path) == []
    assert "made again" in caplog.text


@given(kept_bytes=st.integers(0, 4200))
def test_a_pack_that_was_cut_is_removed(kept_bytes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    fill(opened(folder), "a", {"one": np.arange(1000, dtype=np.float32)})
    (pack,) = packs(folder)
    assert pack.stat().st_size < 4300
    pack.write_bytes(pack.read_bytes()[: min(kept_bytes, pack.stat().st_size - 1)])
    assert "one" not in opened(folder).arrays("a")
    assert packs(folder) == []


def test_the_least_recently_used_kind_goes_first(tmp_path):
    kept, array = opened(tmp_path, 2.5 * 80_000), np.zeros(10_000)
    for age, what in ((300, "old"), (200, "new")):
        fill(kept, what, {"one": array})
        (pack,) = packs(tmp_path, what)
        os.utime(pack, (pack.stat().st_atime - age, pack.stat().st_mtime - age))
    kept.arrays("old").keep_only(["one"])
    fill(opened(tmp_path, 2.5 * 80_000), "third", {"one": array})
    assert [path.parent.name for path in packs(tmp_path)] == ["old", "third"]


def test_a_run_that_needs_more_than_the_limit_works_leaves_no_more_and_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(array_cache, "_PACK_BYTES", 80_000)
    arrays = {str(number): np.full(10_000, float(number)) for number in range(6)}
    held = fill(opened(tmp_path, 3.5 * 80_000), "a", arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(held.read(key, never), array)
    assert len(packs(tmp_path)) == 3
    assert sum("audio_cache.limit_gb" in record.message for record in caplog.records) == 1


def test_what_was_added_before_a_failure_stays_as_far_as_packs_were_full(tmp_path, monkeypatch):
    monkeypatch.setattr(array_cache, "_PACK_BYTES", 80_000)
    with pytest.raises(RuntimeError), opened(tmp_path).writer("a") as writer:
        for number in range(3):
            writer.add(str(number), np.full(6_000, float(number)))
        raise RuntimeError
    held = opened(tmp_path).arrays("a")
    assert [key in held for key in ("0", "1", "2")] == [True, True, False]


def test_processes_wait_for_the_one_that_makes_the_arrays_and_find_them(tmp_path):
    first = process(MAKING, tmp_path)
    assert first.stdout is not None
    made = list(itertools.takewhile(lambda line: line != "added\n", iter(first.stdout.readline, "")))
    assert len(made) == 201
    others = [process(MAKING, tmp_path) for _ in range(2)]
    for other in others:
        # Only the first is kept waiting for this.
        assert other.stdin is not None
        other.stdin.write("go on\n")
        other.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=PATIENCE_S)
    said = [one.communicate("go on\n" if one is first else None, timeout=120)[0] for one in (first, *others)]
    assert said == ["", "begun\nadded\n", "begun\nadded\n"]
    assert [one.returncode for one in (first, *others)] == [0, 0, 0]


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_and_holds_up_nobody(tmp_path):
    dying = process(DYING, tmp_path)
    try:
        assert dying.stdout is not None
        assert dying.stdout.readline() == "half\n"
        waiting = process(MAKING, tmp_path)
    finally:
        dying.send_signal(signal.SIGKILL)
        dying.communicate(timeout=60)
    assert len(waiting.communicate("go on\n", timeout=120)[0].split()) == 202
    assert "one" not in opened(tmp_path).arrays("a")
    assert sorted(path.name for path in (tmp_path / "emotion" / "a").iterdir()) == sorted(
        ["lock", *(path.name for path in packs(tmp_path))]
    )


def test_a_pack_that_another_process_evicts_is_passed_over(tmp_path, monkeypatch):
    kept = opened(tmp_path)
    fill(kept, "a", {"one": np.zeros(3)})
    (pack,) = packs(tmp_path)
    held = CachedArrays()
    pack.unlink()
    held.add(pack)
    assert "one" not in held


def test_a_table_is_kept_and_a_garbled_one_is_empty(tmp_path):
    kept = opened(tmp_path)
    assert kept.load_table("corpus") == {}
    kept.save_table("corpus", {"a.wav": ["stamp", "digest"]})
    assert opened(tmp_path).load_table("corpus") == {"a.wav": ["stamp", "digest"]}
    (path,) = tmp_path.glob("emotion/tables/*")
    path.write_bytes(path.read_bytes()[:-4])
    assert kept.load_table("corpus") == {}


def test_kinds_differ_where_anything_does_and_are_plain_folder_names():
    kinds = [
        cache_kind("a", "b", "c"),
        cache_kind("a", "bc"),
        cache_kind("ab", "c"),
        cache_kind("a", "c", "b"),
        cache_kind("a", "b", "c "),
    ]
    assert len(set(kinds)) == len(kinds)
    assert cache_kind("a", "b") == cache_kind("a", "b")
    assert "/" not in cache_kind("hf:facebook/wav2vec2/../x", "1")


def test_a_cache_that_is_turned_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    kept = ArrayCache(AudioCacheConfig(enabled=False))
    held = fill(kept, "a", {"one": np.arange(3)})
    assert list(tmp_path.iterdir())
    del kept
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(held.read("one", never), [0, 1, 2])


def test_the_cache_is_in_the_users_cache_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert AudioCacheConfig().folder == tmp_path / "cpcscale" / "emotion"


def test_a_place_that_cannot_be_written_is_one_warning_and_a_temporary_folder_takes_its_part(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        kept = opened(tmp_path / "file")
        held = fill(kept, "a", {"one": np.arange(3)})
        np.testing.assert_array_equal(held.read("one", never), [0, 1, 2])
        kept.save_table("t", {"a": ["b"]})
        assert kept.load_table("t") == {"a": ["b"]}
    [line] = [record.getMessage() for record in caplog.records]
    assert "cannot be made or written" in line and "audio_cache.path" in line


def test_a_kind_that_another_user_made_is_read_and_what_is_new_goes_to_a_temporary_folder(tmp_path, caplog):
    fill(opened(tmp_path), "a", {"one": np.arange(3)})
    [kind] = [each for each in (tmp_path / "emotion").iterdir() if each.is_dir()]
    (kind / "lock").unlink()
    (kind / "lock").mkdir()  # Not writable, for root too.
    kept = opened(tmp_path)
    held = fill(kept, "a", {"two": np.arange(2)})
    np.testing.assert_array_equal(held.read("one", never), [0, 1, 2])
    np.testing.assert_array_equal(held.read("two", never), [0, 1])
    assert len(list(kind.glob("*.safetensors"))) == 1
    assert len(caplog.records) == 1


def test_on_a_file_system_without_locks_it_works_and_leaves_what_another_process_is_writing(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fill(opened(tmp_path), "a", {"one": np.arange(3)})
    [kind] = [each for each in (tmp_path / "emotion").iterdir() if each.is_dir()]
    (kind / ".x.tmp").touch()
    monkeypatch.setattr(fcntl, "flock", none)
    held = fill(opened(tmp_path), "a", {"two": np.arange(2)})
    np.testing.assert_array_equal(held.read("two", never), [0, 1])
    assert (kind / ".x.tmp").exists()


def test_a_limit_below_0_is_refused():
    with pytest.raises(UserError, match=r"audio_cache.limit_gb=-1"):
        AudioCacheConfig(limit_gb=-1)
