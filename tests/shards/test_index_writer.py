"""Promises of writing an index: rows are found where they were put, and a version stands whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_store import ObjectStore

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.shards import index_writer as publishing
from cpcscale.shards import rows
from cpcscale.shards.index import Ancestor, Index
from cpcscale.shards.index_writer import IndexWriter, exclude, publish
from cpcscale.shards.rows import ShardEntry


def entry(shard: int, count: int, keys: Sequence[str] = ()) -> ShardEntry:
    """A shard of `count` utterances, or of these keys, that no other shard is equal to."""
    named = keys or [f"{shard}/{number}" for number in range(count)]
    made = [
        {"key": key, "offset": 512 * number, "size": 100, "checksum": 1000 * shard + number, "codec": "flac"}
        | {"samples": 16_000 + number, "rate_hz": 16_000, "group": f"g{shard}", "language": "de"}
        | {"recording": key, "mean": 0.0, "mean_square": 0.01}
        for number, key in enumerate(named)
    ]
    return ShardEntry.of(f"{shard:04d}.tar", bytes([shard % 256]) * 32, 1000 + shard, made)


def written(base: Path | str, entries: Sequence[ShardEntry], after: Index | None = None) -> Index:
    with IndexWriter(str(base), after) as writer:
        for one in entries:
            writer.add(one)
        return writer.publish()


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parts(base: Path) -> list[str]:
    return sorted(path.name for path in (base / "utterances").glob("*"))


@pytest.fixture(scope="module")
def small_groups() -> Any:
    """Row groups of 10 rows and parts of 3 groups, so that small sets have many."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (rows, publishing):
            patch.setattr(module, "GROUP_ROWS", 10)
        patch.setattr(publishing, "_PART_GROUPS", 3)
        patch.setattr(publishing, "_TABLE_ROWS", 4)
        yield


@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 25), st.just(10)), min_size=1, max_size=40),
    before=st.integers(0, 40),
)
def test_every_shard_has_the_rows_that_were_written_wherever_groups_and_parts_end(
    small_groups, tmp_path_factory, counts, before
):
    base = tmp_path_factory.mktemp("set")
    entries = [entry(shard, count) for shard, count in enumerate(counts)]
    first = written(base, entries[:before]) if 0 < before < len(entries) else None
    written(base, entries[before:] if first else entries, first)
    index = Index.load(str(base))
    assert index.fingerprint == Index.of("x", entries).fingerprint
    assert index.shards["path"].to_pylist() == [one.path for one in entries]
    for shard, one in enumerate(entries):
        assert index.rows(shard).table.equals(one.utterances)
    assert index.samples.tolist() == [length for one in entries for length in one.utterances["samples"].to_pylist()]


def test_a_block_that_raises_leaves_no_file_and_no_set(small_groups, tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexWriter(str(tmp_path)) as writer:
        for shard in range(10):
            writer.add(entry(shard, 8))
        assert len(parts(tmp_path)) > 2
        raise KeyboardInterrupt
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_block_that_raises_after_publishing_keeps_the_set(tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexWriter(str(tmp_path)) as writer:
        writer.add(entry(0, 3))
        writer.publish()
        raise KeyboardInterrupt
    assert Index.load(str(tmp_path)).utterances.num_rows == 3


@pytest.mark.parametrize("failing", ["index.json", "shards-", "part-"])
def test_the_old_version_is_whole_when_the_new_one_cannot_be_written(tmp_path, monkeypatch, failing):
    old = written(tmp_path, [entry(0, 3), entry(1, 4)])
    whole = storage.publishing

    def full(url: str) -> Any:
        if url.rpartition("/")[2].startswith(failing):
            raise UserError("the store is full")
        return whole(url)

    # What writes to a local folder goes through it, too.
    monkeypatch.setattr(storage, "publishing", full)
    assert "full" in refusal(lambda: written(tmp_path, [entry(2, 5)], old))
    if failing != "part-":
        assert "full" in refusal(lambda: exclude(old, ["0/1"]))
    monkeypatch.undo()
    loaded = Index.load(str(tmp_path))
    assert loaded.fingerprint == old.fingerprint
    assert loaded.utterances.equals(old.utterances)


def test_an_appended_version_begins_with_the_old_one_and_says_so(tmp_path, s3: ObjectStore):
    for base in (str(tmp_path / "local"), storage.join(s3.base, tmp_path.name)):
        old = written(base, [entry(0, 3), entry(1, 4)])
        left = exclude(old, ["1/2"])
        written(base, [entry(2, 5)], left)
        new = Index.load(base)
        assert new.shards.num_rows == 3
        assert new.excluded.tolist() == [5]
        assert new.lineage == (Ancestor(old.fingerprint, 2, 0), Ancestor(left.fingerprint, 2, 1))
        assert new.fingerprint_of(2) == left.fingerprint
        assert new.fingerprint not in (old.fingerprint, left.fingerprint)
        # Who has the old version open goes on with it.
        assert old.rows(1).table.equals(new.rows(1).table)
        assert old.count == 7


def test_an_excluded_utterance_keeps_its_place(tmp_path):
    whole = written(tmp_path, [entry(0, 3), entry(1, 4)])
    left = exclude(whole, ["0/2", "1/0", "1/3"])
    loaded = Index.load(str(tmp_path))
    assert loaded.fingerprint == left.fingerprint != whole.fingerprint
    assert loaded.excluded.tolist() == [2, 3, 6]
    assert loaded.rows(0).excluded.tolist() == [False, False, True]
    assert loaded.rows(1).excluded.tolist() == [True, False, False, True]
    assert loaded.utterances.equals(whole.utterances)
    assert loaded.ancestor(whole.fingerprint) == Ancestor(whole.fingerprint, 2, 0)


def test_a_key_is_that_of_every_shard_and_a_shard_before_it_names_one(tmp_path):
    index = written(tmp_path / "a", [entry(0, 0, ["x", "y"]), entry(1, 0, ["x", "z"])])
    assert exclude(index, ["x"]).excluded.tolist() == [0, 2]
    other = written(tmp_path / "b", [entry(0, 0, ["x", "y"]), entry(1, 0, ["x", "z"])])
    assert exclude(other, ["0001.tar:x"]).excluded.tolist() == [2]
    # A colon that no shard of this name stands before is a letter of the key.
    odd = written(tmp_path / "c", [entry(0, 0, ["old.tar:x", "y"])])
    assert exclude(odd, ["old.tar:x"]).excluded.tolist() == [0]


def test_a_key_that_no_utterance_has_is_refused_and_nothing_is_published(tmp_path):
    index = written(tmp_path, [entry(0, 0, ["alpha", "beta"]), entry(1, 0, ["gamma"])])
    message = refusal(lambda: exclude(index, ["alpha", "betta"]))
    assert "1 of 2 keys" in message
    assert "did you mean beta?" in message
    assert "0001.tar" in refusal(lambda: exclude(index, ["0001.tar:alpha"]))
    assert Index.load(str(tmp_path)).fingerprint == index.fingerprint


def test_excluding_what_is_excluded_makes_no_version_and_everything_is_refused(tmp_path):
    index = exclude(written(tmp_path, [entry(0, 3)]), ["0/1"])
    assert exclude(index, ["0/1"]) is index
    assert Index.load(str(tmp_path)).lineage == index.lineage
    assert "none is left" in refusal(lambda: exclude(index, ["0/0", "0/2"]))


def test_an_index_in_memory_is_published_with_what_it_excludes(tmp_path):
    plain = Index.of(str(tmp_path), [entry(0, 3), entry(1, 2)])
    ancestor = Ancestor("ab" * 32, 1, 0)
    publish(replace(plain, excluded=np.array([1, 4]), lineage=(ancestor,)))
    loaded = Index.load(str(tmp_path))
    assert loaded.excluded.tolist() == [1, 4]
    assert loaded.lineage == (ancestor,)
    assert loaded.utterances.equals(plain.utterances)


def test_excluding_reads_a_table_that_is_damaged_and_says_which(tmp_path):
    index = written(tmp_path, [entry(0, 3)])
    (name,) = parts(tmp_path)
    (tmp_path / "utterances" / name).write_bytes(b"PAR1 no PAR1")
    assert name in refusal(lambda: exclude(index, ["0/1"]))
