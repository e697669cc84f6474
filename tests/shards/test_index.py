"""Promises of the index: a fingerprint that names the data and nothing else, and tables that are what was published."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore
from trees import noise, write_tree

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.shards.index import SHARD_COLUMNS, UTTERANCE_COLUMNS, Index, ShardEntry, scan
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.read import ShardReader

TABLES = {"shards.parquet": SHARD_COLUMNS, "utterances.parquet": UTTERANCE_COLUMNS}
# What only says where bytes lie, or follows from them.
UNNAMED = {"path", "bytes", "mean", "mean_square"}


def row(number: int, **changes: Any) -> dict[str, Any]:
    values = {"key": f"s/{number}", "offset": 512 * number, "size": 100 + number, "checksum": 2**64 - 1 - number}
    values |= {"codec": "flac", "samples": 16_000 + number, "rate_hz": 16_000, "group": "é", "language": ""}
    return {**values, "mean": 0.001 * number, "mean_square": 0.01, **changes}


def entries(**changes: Any) -> list[ShardEntry]:
    """Two shards of two utterances; `changes` are made to the third utterance."""
    first = ShardEntry("shard-000000.tar", "00" * 32, 10_240, [row(0), row(1)])
    return [first, ShardEntry("shard-000001.tar", "11" * 32, 20_480, [row(2, **changes), row(3)])]


def changed(value: Any) -> Any:
    return f"{value}x" if isinstance(value, str) else value - 1


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copied(shard_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path / "another" / "place"))


def test_the_fingerprint_is_frozen():
    # Checkpoints and tracked runs carry it: no version of anything may change it.
    frozen = "4b762c280a67b52505e00dd5c50bc8cfbf5ee17c1e721b04da02cb5511b6cca5"
    assert Index.of("anywhere", entries()).fingerprint == frozen


def test_the_fingerprint_does_not_depend_on_the_place_or_the_parquet_bytes(shard_set, copied):
    first = Index.load(str(shard_set))
    for name in TABLES:
        before = (copied / name).read_bytes()
        table = pq.read_table(copied / name)
        pq.write_table(table, copied / name, compression="zstd", row_group_size=3, use_dictionary=False)
        assert (copied / name).read_bytes() != before
    second = Index.load(str(copied))
    assert second.fingerprint == first.fingerprint
    assert second.base != first.base
    third = Index.of("s3://not/there", [scan(path, path.name) for path in sorted(copied.glob("*.tar"))])
    assert third.fingerprint == first.fingerprint


@pytest.mark.parametrize("column", [name for name in UTTERANCE_COLUMNS.names if name != "shard"])
def test_the_fingerprint_changes_with_what_names_an_utterance_and_with_nothing_else(column):
    plain = Index.of("x", entries()).fingerprint
    other = Index.of("x", entries(**{column: changed(row(2)[column])})).fingerprint
    assert (other == plain) == (column in UNNAMED)


def test_the_fingerprint_changes_with_the_shards_their_order_and_where_one_ends():
    first, second = entries()
    moved = ShardEntry(first.path, first.sha256, 1, [*first.utterances, second.utterances[0]])
    rest = ShardEntry(second.path, second.sha256, 1, second.utterances[1:])
    sets = [
        [first, second],
        [second, first],
        [first],
        [moved, rest],
        [ShardEntry("p", "22" * 32, 1, []), first, second],
    ]
    sets.append([ShardEntry(first.path, "ff" * 32, first.size_bytes, first.utterances), second])
    sets.append([ShardEntry(first.path, first.sha256, 1, first.utterances[::-1]), second])
    assert len({Index.of("x", shards).fingerprint for shards in sets}) == len(sets)
    elsewhere = ShardEntry("other.tar", first.sha256, 1, first.utterances)
    assert Index.of("x", [elsewhere, second]).fingerprint == Index.of("x", [first, second]).fingerprint


def test_what_is_published_is_loaded_again(tmp_path, s3: ObjectStore):
    for base in (str(tmp_path / "local"), storage.join(s3.base, tmp_path.name)):
        made = Index.of(base, entries())
        made.publish()
        loaded = Index.load(base)
        assert loaded.shards.equals(made.shards)
        assert loaded.utterances.equals(made.utterances)
        assert loaded.bounds.tolist() == [0, 2, 4]
        assert loaded.samples.tolist() == [16_000, 16_001, 16_002, 16_003]
        assert loaded.duration_s == pytest.approx(64_006 / 16_000)


def test_a_set_without_a_marker_is_no_set(copied, tmp_path):
    (copied / "index.json").unlink()
    assert "no shard set" in refusal(lambda: Index.load(str(copied)))
    assert "cpcscale pack" in refusal(lambda: Index.load(str(tmp_path / "absent")))


def test_a_newer_format_asks_for_an_upgrade(copied):
    (copied / "index.json").write_text(json.dumps({"format": 2, "something": "new"}))
    assert "reads up to 1: upgrade" in refusal(lambda: Index.load(str(copied)))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": "x"}', '{"format": null}', "not json", "\0"]
)
def test_a_damaged_marker_is_one_line(copied, text):
    (copied / "index.json").write_text(text)
    assert "pack the set again" in refusal(lambda: Index.load(str(copied)))


@pytest.mark.parametrize(("table", "column"), [(name, column) for name in TABLES for column in TABLES[name].names])
def test_a_value_changed_in_any_column_is_refused(copied, table, column):
    rows = pq.read_table(copied / table).to_pylist()
    rows[1][column] = changed(rows[1][column])
    pq.write_table(pa.Table.from_pylist(rows, TABLES[table]), copied / table)
    assert "do not match" in refusal(lambda: Index.load(str(copied)))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("harm", ["cut", "other", "gone", "row lost", "rows swapped", "column lost", "null", "retyped"])
def test_tables_that_were_damaged_are_refused(copied, table, harm):
    path = copied / table
    read = pq.read_table(path)
    match harm:
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
        case "other":
            path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
        case "gone":
            path.unlink()
        case "row lost":
            pq.write_table(read.slice(0, read.num_rows - 1), path)
        case "rows swapped":
            pq.write_table(read.take([1, 0, *range(2, read.num_rows)]), path)
        case "column lost":
            pq.write_table(read.drop_columns([read.column_names[1]]), path)
        case "null":
            column = pa.array([None, *read.column(1).to_pylist()[1:]], pa.string())
            pq.write_table(read.set_column(1, read.column_names[1], column), path)
        case "retyped":
            last = read.num_columns - 1
            column = pa.array([str(value) for value in read.column(last).to_pylist()])
            pq.write_table(read.set_column(last, read.column_names[last], column), path)
    assert str(copied) in refusal(lambda: Index.load(str(copied)))


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_the_wave_scale_brings_the_packed_corpus_to_zero_mean_and_unit_variance(tmp_path, codec):
    # Utterances of different length, level and offset: a mean over utterances would not do.
    waves = {f"{n}.wav": noise(0.5 + n, seed=n, level=300 * (n + 1)) + np.int16(900 - 400 * n) for n in range(4)}
    root = write_tree(tmp_path / "audio", waves)
    index = pack(str(root), str(tmp_path / "shards"), PackConfig(codec=codec)).splits["train"]
    offset, gain = Index.load(index.base).wave_scale()
    reader = ShardReader(index)
    decoded = np.concatenate([audio.decode(reader.member(n)).astype(np.float64) for n in range(4)])
    scaled = (decoded - offset) * gain
    assert scaled.mean() == pytest.approx(0, abs=1e-6)
    assert scaled.std() == pytest.approx(1, abs=1e-6)


def test_a_corpus_of_one_constant_is_not_divided_by_zero():
    constant = [ShardEntry("a", "00" * 32, 1, [row(0, mean=0.5, mean_square=0.25)])]
    assert Index.of("x", constant).wave_scale() == (0.5, 1.0)


def with_members(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            (path.parent / "member").write_bytes(data)
            tar.add(path.parent / "member", arcname=name)
    return path


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.flac": b"x"}, "lacks metadata 'a'"),
        ({"a.flac": b"x", "a.json": b"{}"}, "lacks metadata 'samples'"),
        ({"a.flac": b"x", "a.json": b"{"}, "not JSON"),
        ({"a.flac": b"x", "a.json": b"\xff"}, "not JSON"),
    ],
)
def test_a_tar_that_pack_did_not_write_is_named_in_one_line(tmp_path, members, words):
    path = with_members(tmp_path / "x.tar", members)
    message = refusal(lambda: scan(path, "x.tar"))
    assert message.startswith("x.tar")
    assert words in message
