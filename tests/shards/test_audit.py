"""Promises of the audit: what is wrong is found and named, what is right is not, and counts are of what is there."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign import by_hand, flac, sound
from object_store import ObjectStore
from trees import noise

from cpcscale import audio, cli, config, storage
from cpcscale.cluster.audit import AuditConfig, audit
from cpcscale.errors import UserError
from cpcscale.report.plots.audit import write_plot
from cpcscale.report.terminal.sets import audit_lines
from cpcscale.shards import audit_totals
from cpcscale.shards.adoption.adopt import adopt, exclude_from
from cpcscale.shards.adoption.read_tar import IndexConfig
from cpcscale.shards.index import Index
from cpcscale.shards.index_writer import publish
from cpcscale.shards.rows import UTTERANCE_COLUMNS, ShardEntry
from cpcscale.shards.tasks import in_turn
from cpcscale.stream import window, window_counts
from cpcscale.stream.lanes import PADDING
from cpcscale.stream.run_order import RunOrder


def audited(base: Path | str, *overrides: str) -> dict[str, Any]:
    spec = config.load(AuditConfig, None, ["lanes=4", "batch=8", "window.seconds=0.25", *overrides])
    values = audit(str(base), spec, in_turn)
    # What a program reads, and what a person reads, can be made of it.
    json.dumps(values)
    assert all("\n" not in line for line in audit_lines(values))
    return values


@pytest.fixture
def copied(shard_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path / "set"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Three tars of others, of 5 members each."""
    base = tmp_path / "foreign"
    for shard in range(3):
        members: dict[str, bytes] = {}
        for n in range(5):
            members |= {f"{n}.flac": flac(0.3 + 0.1 * n, 10 * shard + n), f"{n}.json": b'{"speaker": "s%d"}' % (n % 2)}
        by_hand(base / f"{shard}.tar", members)
    adopt(str(base), IndexConfig())
    return base


def test_a_set_that_is_whole_has_no_problem_and_its_counts_are_right(shard_set):
    index = Index.load(str(shard_set))
    values = audited(shard_set)
    assert values["ok"]
    assert values["problems"] == []
    assert values["fingerprint"] == index.fingerprint
    assert (values["tars"], values["utterances"]) == (index.shards.num_rows, 24)
    assert values["decoded"] == 24
    assert values["hours"] == values["decoded_hours"] == pytest.approx(index.duration_s / 3600)
    assert values["bytes"] == sum(path.stat().st_size for path in shard_set.glob("*.tar"))
    assert sum(values["durations"]["utterances"]) == 24
    assert values["members_not_indexed"] == values["tars_not_indexed"] == values["excluded"] == 0
    assert values["shuffle"]["exact"]


def test_hours_are_told_by_language_and_by_group_and_add_up(tmp_path):
    lengths = {"anna": 1.5, "bert": 0.5, "carl": 2.0}
    members: dict[str, bytes] = {}
    for n, (speaker, seconds) in enumerate(lengths.items()):
        told = {"speaker": speaker, "language": "de" if n else ""}
        members |= {f"{n}.flac": flac(seconds, n), f"{n}.json": json.dumps(told).encode()}
    by_hand(tmp_path / "a.tar", {**members, "own.flac": flac(3.0, 9)})
    by_hand(tmp_path / "b.tar", {"0.flac": flac(4.0, 10), "0.json": b'{"speaker": "bert", "language": "nl"}'})
    adopt(str(tmp_path), IndexConfig())
    values = audited(tmp_path)
    hours = {name: round(3600 * value, 3) for name, value in values["hours_by_group"].items()}
    assert list(hours.items()) == [("bert", 4.5), ("carl", 2.0), ("anna", 1.5)]
    languages = {name: round(3600 * value, 3) for name, value in values["hours_by_language"].items()}
    assert list(languages.items()) == [("", 4.5), ("nl", 4.0), ("de", 2.5)]
    assert (values["languages"], values["groups"], values["recordings"]) == (2, 3, 5)
    assert 3600 * values["hours_without_group"] == pytest.approx(3.0)
    assert 3600 * values["hours_of_groups"] == pytest.approx(8.0)


def test_durations_are_counted_in_classes_that_hold_them(tmp_path):
    seconds = [0.25, 0.26, 0.5, 1.0, 1.01, 3.9, 12.0]
    by_hand(tmp_path / "a.tar", {f"{n}.flac": flac(length, n) for n, length in enumerate(seconds)})
    adopt(str(tmp_path), IndexConfig())
    values = audited(tmp_path)
    edges, utterances = values["durations"]["edges_s"], values["durations"]["utterances"]
    assert utterances == np.histogram(seconds, edges)[0].tolist()
    assert values["duration_s"]["least"] == 0.25
    assert values["duration_s"]["most"] == 12.0
    assert values["duration_s"]["median"] == pytest.approx(1.0, rel=0.02)


# What is wrong


def flipped(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def middle(index: Index, shard: int, row: int) -> int:
    """A byte in the midst of a member."""
    rows = index.rows(shard)
    return int(rows.offset[row] + rows.size[row] // 2)


def swap(path: Path, _: Index) -> None:
    """The same members in another order: every byte is good and none is where the index says."""
    whole = path.read_bytes()
    half = whole.index(b"2.flac")
    tail = whole.rstrip(b"\0")
    end = len(tail) + (-len(tail)) % 512
    path.write_bytes(whole[half:end] + whole[:half] + whole[end:])


HARMS: dict[str, tuple[Callable[[Path, Index], Any], list[str]]] = {
    "a byte of a member": (
        lambda path, index: flipped(path, middle(index, 1, 2)),
        ["2 fails its checksum", "its sha256 is"],
    ),
    "a byte of a JSON": (lambda path, _: flipped(path, path.read_bytes().index(b"speaker")), ["its sha256 is"]),
    "a byte of the end": (lambda path, _: flipped(path, -700), ["what follows byte", "its sha256 is"]),
    "cut in a member": (
        lambda path, index: path.write_bytes(path.read_bytes()[: middle(index, 1, 3)]),
        ["2 of 5 members are not in the tar, the first 3", "cut short or damaged", "the index says"],
    ),
    "cut between members": (
        lambda path, index: path.write_bytes(path.read_bytes()[: int(index.rows(1).offset[3]) - 512]),
        ["2 of 5 members are not in the tar, the first 3", "the index says"],
    ),
    "gone": (lambda path, _: path.unlink(), ["the shard is missing"]),
    "empty": (lambda path, _: path.write_bytes(b""), ["5 of 5 members", "empty file", "it has 0 bytes"]),
    "no tar": (
        lambda path, _: path.write_bytes(b"x" * path.stat().st_size),
        ["5 of 5 members", "cut short or damaged", "its sha256 is"],
    ),
    "compressed": (lambda path, _: path.write_bytes(b"\x1f\x8b" + bytes(99)), ["gzip"]),
    "another tar": (
        lambda path, _: shutil.copy(path.with_name("0.tar"), path),
        ["bytes, the index says", "and 1 problems more"],
    ),
    "members in another order": (swap, ["is at byte", "its sha256 is"]),
    "bytes behind its end": (lambda path, _: path.write_bytes(path.read_bytes() * 2), ["what follows byte", "it has"]),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_wrong_with_a_shard_is_found_and_named(foreign, harm):
    index = Index.load(str(foreign))
    action, expected = HARMS[harm]
    action(foreign / "1.tar", index)
    values = audited(foreign)
    assert not values["ok"]
    assert values["problem_count"] >= len(expected)
    assert all(problem.startswith("1.tar: ") for problem in values["problems"])
    for words in expected:
        assert any(words in problem for problem in values["problems"]), values["problems"]
    # The other shards were looked at all the same.
    assert values["decoded"] >= 10


def test_it_never_stops_at_the_first_problem(foreign):
    (foreign / "0.tar").unlink()
    flipped(foreign / "1.tar", middle(Index.load(str(foreign)), 1, 4))
    (foreign / "2.tar").write_bytes(b"")
    values = audited(foreign)
    assert {problem.partition(":")[0] for problem in values["problems"]} == {"0.tar", "1.tar", "2.tar"}
    assert "the shard is missing" in values["problems"][0]


@pytest.mark.parametrize("name", UTTERANCE_COLUMNS.names)
def test_a_row_of_the_index_that_was_changed_is_found_and_the_shards_are_read_nevertheless(foreign, name):
    (path,) = (foreign / "utterances").iterdir()
    rows = pq.read_table(path).to_pylist()
    value = rows[7][name]
    rows[7][name] = f"{value}x" if isinstance(value, str) else value + 1
    pq.write_table(pa.Table.from_pylist(rows, UTTERANCE_COLUMNS), path)
    values = audited(foreign)
    assert values["problem_count"] == 1
    assert "1.tar" in values["problems"][0]
    assert "do not match" in values["problems"][0]
    assert values["decoded"] == 10


def remade(base: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The set with another index of the same tars, consistent in itself; `change` is made to the row of each member."""
    index = Index.load(str(base))
    entries = []
    for shard, entry in enumerate(index.shards.to_pylist()):
        rows = index.rows(shard).table.to_pylist()
        for row in rows:
            change(row)
        entries.append(ShardEntry.of(entry["path"], entry["sha256"], entry["bytes"], rows))
    publish(Index.of(str(base), entries))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 4_000}, "decodes to 6400 samples, the index says 4000"),
        ({"checksum": 1}, "fails its checksum"),
        ({"size": 3}, "bytes, the index says 3"),
        ({"offset": 100}, "are not in the tar, the first 1"),
        ({"key": "other"}, "the index says other.flac"),
        ({"codec": "wav"}, "the index says 1.wav"),
    ],
)
def test_an_index_that_says_something_else_than_its_tars_is_found(foreign, change, words):
    remade(foreign, lambda row: row.update(change) if row["key"] == "1" else None)
    values = audited(foreign)
    problems = [problem for problem in values["problems"] if words in problem]
    assert {problem.partition(":")[0] for problem in problems} == {"0.tar", "1.tar", "2.tar"}


@pytest.mark.parametrize("name", ["samples", "mean", "mean_square"])
def test_a_shard_table_that_does_not_add_up_is_found(foreign, name):
    index = Index.load(str(foreign))
    values = index.shards[name].to_pylist()
    values[1] = values[1] * 2 + 1
    place = index.shards.column_names.index(name)
    column = pa.array(values, index.shards.schema.types[place])
    publish(replace(index, shards=index.shards.set_column(place, index.shards.schema[place], column)))
    values = audited(foreign)
    assert values["problem_count"] == 1
    assert f"1.tar: its rows give {name}=" in values["problems"][0]


def test_a_member_that_matches_its_checksum_and_does_not_decode_is_found(tmp_path):
    hole = bytearray(flac(1.0))
    hole[len(hole) // 2 : len(hole) // 2 + 200] = bytes(200)
    by_hand(tmp_path / "a.tar", {"0.flac": flac(), "bad.flac": bytes(hole)})
    # Taken by its header alone.
    adopt(str(tmp_path), IndexConfig(level_share=0.0))
    assert audited(tmp_path, "share=0")["ok"]
    values = audited(tmp_path)
    assert values["problem_count"] == 1
    assert "a.tar: bad cannot be trained on (unreadable)" in values["problems"][0]


def test_the_first_problems_of_a_shard_are_told_and_the_rest_counted(tmp_path, monkeypatch):
    for shard in range(3):
        by_hand(tmp_path / f"{shard}.tar", {f"{n}.flac": flac(0.2, 20 * shard + n) for n in range(20)})
    adopt(str(tmp_path), IndexConfig())
    remade(tmp_path, lambda row: row.update(checksum=0))
    values = audited(tmp_path)
    assert values["problem_count"] == 60
    assert len(values["problems"]) == 3 * 6
    assert "0.tar: and 15 problems more" in values["problems"]
    monkeypatch.setattr(audit_totals, "_MOST_PROBLEMS", 4)
    assert len(audited(tmp_path)["problems"]) == 4


def test_a_share_of_the_members_is_decoded_by_key_and_every_byte_is_checked(tmp_path):
    by_hand(tmp_path / "a.tar", {f"{n}.flac": flac(0.2, n) for n in range(60)})
    adopt(str(tmp_path), IndexConfig())
    first, again, other = (audited(tmp_path, "share=0.5", f"seed={seed}") for seed in (0, 0, 1))
    assert first["decoded"] == again["decoded"]
    assert 15 < first["decoded"] < 45
    assert first["decoded_hours"] < first["hours"]
    assert first["decoded_hours"] != other["decoded_hours"]
    flipped(tmp_path / "a.tar", middle(Index.load(str(tmp_path)), 0, 30))
    assert audited(tmp_path, "share=0")["problem_count"] == 2


def test_what_is_printed_begins_with_the_set_and_ends_with_its_problems(foreign):
    (foreign / "1.tar").unlink()
    lines = list(audit_lines(audited(foreign)))
    assert lines[0].startswith("audited ")
    assert "3 tars, 15 utterances" in lines[0]
    assert lines[-1] == "    1.tar: the shard is missing"


# What is told


@pytest.mark.parametrize("bucket_rows", [1 << 24, 2])
def test_duplicates_are_found_across_shards_and_named(tmp_path, monkeypatch, bucket_rows):
    monkeypatch.setattr(audit_totals, "_BUCKET_ROWS", bucket_rows)
    same, other = flac(0.5, 1), flac(0.7, 2)
    by_hand(tmp_path / "a.tar", {"0.flac": same, "1.flac": flac(seed=3), "2.flac": other})
    by_hand(tmp_path / "b.tar", {"0.flac": other, "1.flac": flac(seed=4), "2.flac": same, "3.flac": same})
    adopt(str(tmp_path), IndexConfig())
    found = audited(tmp_path)["duplicates"]
    assert (found["utterances"], found["contents"]) == (3, 2)
    assert found["first"] == [["a.tar:0", "b.tar:2", "b.tar:3"], ["a.tar:2", "b.tar:0"]]
    # As exclude takes them; then they are told no more.
    exclude_from(str(tmp_path), [key for group in found["first"] for key in group[1:]])
    values = audited(tmp_path)
    assert values["duplicates"] == {"utterances": 0, "contents": 0, "first": []}
    assert values["excluded"] == 3
    assert 3600 * values["excluded_hours"] == pytest.approx(0.5 + 0.5 + 0.7)
    assert values["parent"]


def test_what_lies_beside_the_index_is_told(foreign):
    by_hand(foreign / "new.tar", {"x.flac": flac()})
    by_hand(foreign / "2.tar", {"bad.wav": b"junk", "good.flac": flac()})
    (foreign / "index.json").unlink()
    (foreign / "new.tar").rename(foreign.parent / "new.tar")
    adopt(str(foreign), IndexConfig())
    shutil.copy(foreign.parent / "new.tar", foreign)
    values = audited(foreign)
    assert values["ok"]
    assert (values["members_not_indexed"], values["tars_not_indexed"]) == (1, 1)


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match="no shard set"):
        audited(tmp_path)


@pytest.mark.parametrize("bad", ["share=1.5", "share=-1", "batch=6", "lanes=0", "batches=0"])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(UserError):
        config.load(AuditConfig, None, ["lanes=4", "batch=8", bad])


# The shuffle


def long_ones(base: Path, excluded: Sequence[str] = ()) -> Index:
    """Two tars of long utterances, some of one recording, so that a batch may meet a recording twice."""
    for shard in range(2):
        members: dict[str, bytes] = {}
        for n in range(6):
            told = json.dumps({"recording": f"r{n // 2 + 2 * shard}"}).encode()
            members |= {f"{shard}-{n}.wav": audio.encode(noise(0.5 + 0.4 * n, n), "wav"), f"{shard}-{n}.json": told}
        by_hand(base / f"{shard}.tar", members)
    adopt(str(base), IndexConfig())
    if excluded:
        exclude_from(str(base), excluded)
    return Index.load(str(base))


@pytest.mark.parametrize("excluded", [(), ("0-5", "1-0", "1-1")])
@pytest.mark.parametrize("kind", ["tile", "crop"])
def test_the_shuffle_figure_is_that_of_the_batches_that_training_gets(tmp_path, kind, excluded):
    index = long_ones(tmp_path, excluded)
    overrides = ["lanes=2", "batch=4", "window.seconds=0.25", f"window.kind={kind}", "seed=3"]
    spec = config.load(AuditConfig, None, overrides)
    figure = audit(str(tmp_path), spec, in_turn)["shuffle"]
    # All of it again, window by window.
    recording = index.utterances["recording"].to_pylist()
    windows = window.count(spec.window, index.samples)
    out = set(index.excluded.tolist())
    order = RunOrder(window_counts.shard_windows(index, spec.window), 3, 2, 4)
    found = perfect = 0.0
    counted = Counter(
        recording[utterance]
        for utterance in range(index.count)
        for _ in range(windows[utterance] * (utterance not in out))
    )
    total = sum(counted.values())
    same = sum(count * (count - 1) for count in counted.values())
    for step in range(order.lanes.steps_per_epoch):
        _, shard_B, ordinal_B = order.rows(step, range(2))
        met = []
        for shard, ordinal in zip(shard_B.tolist(), ordinal_B.tolist(), strict=True):
            if shard != PADDING:
                first, last = index.bounds[shard], index.bounds[shard + 1]
                row = window.locate(windows[first:last], np.array([ordinal]))[0][0]
                if first + row not in out:
                    met.append(recording[first + row])
        found += sum(a == b for a, b in itertools.combinations(met, 2))
        perfect += len(met) * (len(met) - 1) / 2 * same / (total * (total - 1))
    assert figure["exact"]
    assert figure["batches"] == order.lanes.steps_per_epoch
    assert figure["pairs"] == pytest.approx(found / figure["batches"])
    assert figure["perfect"] == pytest.approx(perfect / figure["batches"])
    assert figure["ratio"] == pytest.approx(found / perfect)


def test_a_set_in_which_recordings_lie_together_shuffles_worse_than_one_in_which_they_do_not(tmp_path):
    ratios = {}
    for name, sorted_by_recording in (("together", True), ("apart", False)):
        for shard in range(8):
            members: dict[str, bytes] = {}
            for n in range(8):
                told = json.dumps({"recording": f"r{shard if sorted_by_recording else n}"}).encode()
                members |= {f"{n}.flac": flac(0.3, 8 * shard + n), f"{n}.json": told}
            by_hand(tmp_path / name / f"{shard}.tar", members)
        adopt(str(tmp_path / name), IndexConfig())
        # One lane reads one tar at a time: eight windows of a batch are those of a tar.
        ratios[name] = audited(tmp_path / name, "lanes=1", "batch=8", "window.kind=crop")["shuffle"]["ratio"]
    assert ratios["together"] == pytest.approx(9.0)
    assert ratios["apart"] == pytest.approx(0.0)


def test_a_sample_of_batches_says_so_and_gives_its_error(tmp_path):
    long_ones(tmp_path)
    whole = audited(tmp_path, "window.seconds=0.05")["shuffle"]
    sample = audited(tmp_path, "window.seconds=0.05", "batches=10")["shuffle"]
    assert whole["exact"]
    assert not sample["exact"]
    assert sample["batches"] == 10 < whole["batches"]
    assert sample["error"] > 0
    assert abs(sample["pairs"] - whole["pairs"]) < 6 * sample["error"]


def test_a_plan_that_cannot_be_made_is_said_and_is_no_problem_of_the_set(foreign):
    values = audited(foreign, "lanes=1000", "batch=1000")
    assert values["ok"]
    assert "fewer than train.lanes" in values["shuffle"]["why"]


# The verbs


def test_the_picture_of_an_audit_is_a_png_also_of_a_set_with_nothing_in_it(foreign, tmp_path):
    publish(Index.of(str(tmp_path / "none"), []))
    for name, base in (("some", foreign), ("none", tmp_path / "none")):
        path = tmp_path / f"{name}.png"
        write_plot(audited(base), str(path))
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"\.png"):
        write_plot(audited(foreign), str(tmp_path / "x.jpg"))


def test_a_set_of_a_store_is_audited_as_one_of_a_disk(tmp_path, s3: ObjectStore):
    base = storage.join(s3.base, tmp_path.name)
    for shard in range(2):
        path = by_hand(tmp_path / f"{shard}.tar", {f"{n}.ogg": sound("ogg", 0.6, 22_050, 2, n) for n in range(3)})
        storage.write(storage.join(base, path.name), path.read_bytes())
    near, far = str(tmp_path), base
    for place in (near, far):
        adopt(place, IndexConfig())
    assert {**audited(far), "shards": ""} == {**audited(near), "shards": ""}
    storage.write(storage.join(base, "1.tar"), (tmp_path / "1.tar").read_bytes()[:3000])
    storage.remove(storage.join(base, "0.tar"))
    problems = audited(far)["problems"]
    assert problems[0] == "0.tar: the shard is missing"
    assert any(problem.startswith("1.tar: it is cut short") for problem in problems)


def test_the_verbs_index_and_audit_a_set_on_ray_with_their_exit_statuses(tmp_path, capsys, monkeypatch):
    base = tmp_path / "set"
    for shard in range(3):
        by_hand(base / f"{shard}.tar", {f"s{n}/{n}.flac": flac(0.6, 10 * shard + n) for n in range(4)})
    (tmp_path / "m.csv").write_text("path,speaker\ns0/0.flac,anna\n", encoding="utf-8")

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(arguments))
        return status, *capsys.readouterr()

    status, out, _ = run("index", str(base), "group_folder=1", f"manifest={tmp_path / 'm.csv'}", "--json")
    made = json.loads(out)
    assert (status, made["state"], made["utterances"]) == (0, "made", 12)
    assert made["groups_from"] == {"folder 1": 9, "manifest speaker": 3}
    status, out, _ = run("index", str(base))
    assert status == 0
    assert "is up to date" in out
    plan = ("lanes=4", "batch=8", "window.seconds=0.25")
    plot = tmp_path / "audit.png"
    status, out, _ = run("audit", str(base), *plan, "--json", "--plot", str(plot))
    assert (status, json.loads(out)["ok"]) == (0, True)
    assert json.loads(out) == audited(base)
    assert plot.read_bytes().startswith(b"\x89PNG")
    status, out, _ = run("index", str(base), "--exclude", "0.tar:s1/1", "--exclude", "s2/2")
    assert status == 0
    assert "excluded utterances" in out
    assert Index.load(str(base)).excluded.tolist() == [1, 2, 6, 10]
    by_hand(base / "3.tar", {"s9/9.flac": flac(0.6, 99)})
    status, _, err = run("index", str(base))
    assert status == 2
    assert err.count("\n") == 1
    assert "--append" in err
    assert run("index", str(base), "--append")[0] == 0
    (base / "1.tar").write_bytes(b"")
    status, out, _ = run("audit", str(base), *plan)
    assert status == 1
    assert "    1.tar: " in out
    assert run("audit", str(tmp_path / "absent"))[0] == 2
    assert run("index", str(base), "--append", "--exclude", "x")[0] == 2
