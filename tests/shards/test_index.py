"""Promises of the index: a fingerprint that names the data and nothing else, and tables that are what was published."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Sequence
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
from cpcscale.shards.index import Index
from cpcscale.shards.index_writer import publish
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.reader import ShardReader
from cpcscale.shards.rows import SHARD_COLUMNS, UTTERANCE_COLUMNS, ShardEntry, scan

TABLES = {"shards": SHARD_COLUMNS, "utterances": UTTERANCE_COLUMNS}
# What only says where bytes lie, or follows from them, or groups utterances after the fact.
UNNAMED = {"recording", "mean", "mean_square"}


def row(number: int, **changes: Any) -> dict[str, Any]:
    values = {"key": f"s/{number}", "offset": 512 * number, "size": 100 + number, "checksum": 2**64 - 1 - number}
    values |= {"codec": "flac", "samples": 16_000 + number, "rate_hz": 16_000, "group": "é", "language": ""}
    return {**values, "recording": f"r{number}", "mean": 0.001 * number, "mean_square": 0.01, **changes}


def entry(name: str, digest: int, rows: Sequence[dict[str, Any]], size: int = 10_240) -> ShardEntry:
    return ShardEntry.of(name, bytes([digest]) * 32, size, rows)


def entries(**changes: Any) -> list[ShardEntry]:
    """Two shards of two utterances; `changes` are made to the third utterance."""
    first = entry("shard-000000.tar", 0, [row(0), row(1)])
    return [first, entry("shard-000001.tar", 0x11, [row(2, **changes), row(3)], 20_480)]


def changed(value: Any) -> Any:
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    return f"{value}x" if isinstance(value, str) else value - 1


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table_path(base: Path, table: str) -> Path:
    """The one file of a table of a small set."""
    (path,) = base.glob("shards-*.parquet" if table == "shards" else "utterances/part-*.parquet")
    return path


def read_all(base: Path) -> pa.Table:
    """Loads the set and every row of it."""
    return Index.load(str(base)).utterances


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
        path = table_path(copied, name)
        before = path.read_bytes()
        pq.write_table(pq.read_table(path), path, compression="zstd", use_dictionary=False, data_page_size=100)
        assert path.read_bytes() != before
    second = Index.load(str(copied))
    assert second.fingerprint == first.fingerprint
    assert second.utterances.equals(first.utterances)
    assert second.base != first.base
    third = Index.of("s3://not/there", [scan(path, path.name) for path in sorted(copied.glob("*.tar"))])
    assert third.fingerprint == first.fingerprint


@pytest.mark.parametrize("column", UTTERANCE_COLUMNS.names)
def test_the_fingerprint_changes_with_what_names_an_utterance_and_with_nothing_else(column):
    plain = Index.of("x", entries()).fingerprint
    other = Index.of("x", entries(**{column: changed(row(2)[column])})).fingerprint
    assert (other == plain) == (column in UNNAMED)


def test_the_fingerprint_changes_with_the_shards_their_order_and_where_one_ends():
    first, second = entries()
    rows = [*first.utterances.to_pylist(), *second.utterances.to_pylist()]
    sets = [
        [first, second],
        [second, first],
        [first],
        [entry("a", 0, rows[:3]), entry("b", 0x11, rows[3:])],
        [entry("p", 0x22, []), first, second],
        [entry("a", 0xFF, rows[:2]), second],
        [entry("a", 0, rows[1::-1]), second],
    ]
    assert len({Index.of("x", shards).fingerprint for shards in sets}) == len(sets)
    elsewhere = ShardEntry("other.tar", first.sha256, 1, first.utterances)
    assert Index.of("x", [elsewhere, second]).fingerprint == Index.of("x", [first, second]).fingerprint


def test_what_is_published_is_loaded_again(tmp_path, s3: ObjectStore):
    for base in (str(tmp_path / "local"), storage.join(s3.base, tmp_path.name)):
        made = Index.of(base, entries())
        publish(made)
        loaded = Index.load(base)
        assert loaded.fingerprint == made.fingerprint
        assert loaded.shards.equals(made.shards)
        assert loaded.utterances.equals(made.utterances)
        assert loaded.bounds.tolist() == [0, 2, 4]
        assert loaded.samples.tolist() == [16_000, 16_001, 16_002, 16_003]
        assert loaded.duration_s == pytest.approx(64_006 / 16_000)
        assert [loaded.key(utterance) for utterance in range(4)] == ["s/0", "s/1", "s/2", "s/3"]
        assert loaded.shard_of(np.arange(4)).tolist() == [0, 0, 1, 1]


def test_loading_reads_no_rows_of_utterances(copied):
    # The set opens without its largest file; whoever asks for a row is told which file is missing.
    path = table_path(copied, "utterances")
    path.unlink()
    index = Index.load(str(copied))
    assert index.count == 24
    assert str(path) in refusal(lambda: index.rows(0))


def test_an_index_goes_to_another_process_and_reads_there(shard_set):
    index = Index.load(str(shard_set))
    before = index.rows(1).table
    other = pickle.loads(pickle.dumps(index))  # noqa: S301
    assert other.fingerprint == index.fingerprint
    assert other.rows(1).table.equals(before)


def test_a_set_without_a_marker_is_no_set(copied, tmp_path):
    (copied / "index.json").unlink()
    assert "no shard set" in refusal(lambda: Index.load(str(copied)))
    message = refusal(lambda: Index.load(str(tmp_path / "absent")))
    assert "cpcscale pack" in message
    assert "cpcscale index" in message


def test_a_newer_format_asks_for_an_upgrade_and_an_older_one_to_index_again(copied):
    (copied / "index.json").write_text(json.dumps({"format": 3, "something": "new"}))
    assert "reads up to 2: upgrade" in refusal(lambda: Index.load(str(copied)))
    (copied / "index.json").write_text(json.dumps({"format": 1, "something": "old"}))
    assert "cpcscale index" in refusal(lambda: Index.load(str(copied)))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": "x"}', '{"format": null}', "not json", "\0"]
)
def test_a_damaged_marker_is_one_line(copied, text):
    (copied / "index.json").write_text(text)
    assert "pack the set again" in refusal(lambda: Index.load(str(copied)))


@pytest.mark.parametrize("name", ["fingerprint", "contents", "parts", "lineage"])
def test_a_marker_that_was_changed_is_refused(copied, name):
    marker = json.loads((copied / "index.json").read_text())
    older = {"fingerprint": "0" * 64, "shards": 1, "excluded": 0}
    others = {"parts": [{**part, "first_shard": 1} for part in marker["parts"]], "lineage": [older]}
    marker[name] = others.get(name, "0" * 64)
    (copied / "index.json").write_text(json.dumps(marker))
    assert "do not match" in refusal(lambda: Index.load(str(copied)))


@pytest.mark.parametrize(("table", "column"), [(name, column) for name in TABLES for column in TABLES[name].names])
def test_a_value_changed_in_any_column_is_refused(copied, table, column):
    path = table_path(copied, table)
    rows = pq.read_table(path).to_pylist()
    rows[1][column] = changed(rows[1][column])
    pq.write_table(pa.Table.from_pylist(rows, TABLES[table]), path)
    # The shard table at once, the rows of a shard when they are read.
    assert "do not match" in refusal(lambda: Index.load(str(copied)) if table == "shards" else read_all(copied))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "harm", ["cut", "other", "gone", "row lost", "rows swapped", "column lost", "null", "absent text", "retyped"]
)
def test_tables_that_were_damaged_are_refused(copied, table, harm):
    path = table_path(copied, table)
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
            column = pa.array([None, *read.column(1).to_pylist()[1:]], read.schema.types[1])
            pq.write_table(read.set_column(1, read.column_names[1], column), path)
        case "absent text":
            name = "language" if table == "utterances" else "path"
            blank = pa.array([None] * read.num_rows, pa.string())
            pq.write_table(read.set_column(read.column_names.index(name), name, blank), path)
        case "retyped":
            last = read.num_columns - 1
            column = pa.array([str(value) for value in read.column(last).to_pylist()])
            pq.write_table(read.set_column(last, read.column_names[last], column), path)
    assert str(copied) in refusal(lambda: Index.load(str(copied)) if table == "shards" else read_all(copied))


def test_one_damaged_row_costs_its_own_shard_alone(copied):
    path = table_path(copied, "utterances")
    rows = pq.read_table(path).to_pylist()
    rows[-1]["samples"] += 1
    pq.write_table(pa.Table.from_pylist(rows, UTTERANCE_COLUMNS), path)
    index = Index.load(str(copied))
    last = index.shards.num_rows - 1
    assert [index.rows(shard).table.num_rows for shard in range(last)] == index.shards["utterances"].to_pylist()[:-1]
    assert index.url(last) in refusal(lambda: index.rows(last))


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_the_wave_scale_brings_the_packed_corpus_to_zero_mean_and_unit_variance(tmp_path, codec):
    # Utterances of different length, level and offset: a mean over utterances would not do.
    waves = {f"{n}.wav": noise(0.5 + n, seed=n, level=300 * (n + 1)) + np.int16(900 - 400 * n) for n in range(4)}
    root = write_tree(tmp_path / "audio", waves)
    index = pack(str(root), str(tmp_path / "shards"), PackConfig(codec=codec)).splits["train"]
    offset, gain = Index.load(index.base).wave_scale()
    reader = ShardReader(index)
    rows = reader.rows(0)
    decoded = np.concatenate([audio.decode(reader.member(rows, n)).astype(np.float64) for n in range(4)])
    reader.close()
    scaled = (decoded - offset) * gain
    assert scaled.mean() == pytest.approx(0, abs=1e-6)
    assert scaled.std() == pytest.approx(1, abs=1e-6)


def test_a_corpus_of_one_constant_is_not_divided_by_zero():
    constant = [entry("a", 0, [row(0, mean=0.5, mean_square=0.25)])]
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
