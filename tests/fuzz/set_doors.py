"""Damaged tars and damaged shard sets against index, audit and pack."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash
from test_audio_files import coded
from trees import corpus

from cpcscale import audio
from cpcscale.cluster.audit import AuditConfig, audit
from cpcscale.emotion.audio.from_shards import open_index
from cpcscale.report.terminal.sets import audit_lines
from cpcscale.shards.adoption.adopt import adopt
from cpcscale.shards.adoption.read_tar import IndexConfig
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, PackedSets, pack
from cpcscale.shards.rows import scan
from cpcscale.shards.tasks import RunTasks, in_turn
from fuzz.doors import Door, Folder, WrongSuccess, emptied

_AUDIT = AuditConfig(lanes=1, batch=1, batches=2)
_TAR = "set/a.000000.tar"


def doors(scratch: Path) -> list[Door]:
    """`index` of tars by hand, the tars of `pack`, and a shard set whose files are damaged one at a time."""
    tars = _tars()
    packed, stopped = _Packed(scratch / "packed"), _Packed(scratch / "stopped", stopped=True)
    indexed = _Indexed(scratch / "indexed", next(iter(tars.values())))
    labels = _labels()
    indexing = _Indexing(scratch / "index", tars, labels)
    return [
        Door("tar", tars, indexing.tar, weight=2),
        Door("labels of a tar", labels, indexing.labels, text=True),
        Door("tar of pack", {"own.tar": packed.tar}, packed.scan),
        Door("shard set", packed.seeds, packed.audit, weight=2),
        Door("pack again", packed.noted, packed.again, text=True),
        Door("pack resumed", stopped.noted, stopped.again, text=True),
        Door("index again", indexed.seeds, indexed.again, text=True, weight=0.3),
    ]


def _tars() -> dict[str, bytes]:
    """Tars of each format by name; every audio member has a JSON with its speaker."""
    members: dict[str, bytes] = {"notes.txt": b"notes"}
    for number, form in enumerate(("wav", "flac", "mp3", "opus", "vorbis")):
        suffix = {"vorbis": "ogg"}.get(form, form)
        members[f"s{number % 2}/u{number}.{suffix}"] = coded(form, 0.4, number)
        members[f"s{number % 2}/u{number}.json"] = json.dumps({"speaker": f"s{number % 2}", "language": "en"}).encode()
    found = {}
    for name, form in (("pax", tarfile.PAX_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("ustar", tarfile.USTAR_FORMAT)):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(("long" * 40 + "/" if form != tarfile.USTAR_FORMAT else "") + member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found[f"{name}.tar"] = out.getvalue()
    return found


def _labels() -> dict[str, bytes]:
    rows = [(f"s{number % 2}/u{number}.wav", f"s{number % 2}", "en") for number in range(5)]
    table = "\n".join(["path,speaker,language", *(",".join(row) for row in rows)]) + "\n"
    cuts = [
        {"id": f"s{n % 2}/u{n}", "supervisions": [{"speaker": f"s{n % 2}", "language": "en"}], "recording": {"id": "r"}}
        for n in range(5)
    ]
    nemo = [{"audio_filepath": path, "speaker": speaker, "language": language} for path, speaker, language in rows]
    return {
        "m.csv": table.encode(),
        "m.tsv": table.replace(",", "\t").encode(),
        "m.jsonl": "".join(json.dumps(row) + "\n" for row in nemo).encode(),
        "cuts.000000.jsonl": "".join(json.dumps(row) + "\n" for row in cuts).encode(),
    }


class _Indexing:
    """`index` of one damaged tar, or of a whole tar with damaged labels, then `audit`."""

    def __init__(self, folder: Path, tars: dict[str, bytes], labels: dict[str, bytes]) -> None:
        self._folder, self._tars, self._seeds = folder, tars, labels

    def tar(self, target: str, data: bytes, done: str) -> bool:
        emptied(self._folder / "set")
        (self._folder / _TAR).write_bytes(data)
        adopted = adopt(str(self._folder / "set"), IndexConfig())
        account = adopted.account
        if abs(account.found[1] - account.taken[1] - account.left_out_s) > 0.002:
            raise WrongSuccess(f"the account does not add up: {account.values()}")
        if account.found[0] != account.taken[0] + sum(adopted.left_out.values()):
            raise WrongSuccess(f"files do not add up: {account.values()}")
        rows = adopted.index.utterances.to_pylist()
        for row in rows:
            member = data[row["offset"] : row["offset"] + row["size"]]
            if xxhash.xxh3_64_intdigest(member) != row["checksum"] or len(audio.decode(member)) != row["samples"]:
                raise WrongSuccess(f"the index row {row} is not what is in the tar")
        if done == "none" and {(row["group"], row["language"]) for row in rows} != {("s0", "en"), ("s1", "en")}:
            raise WrongSuccess(f"labels of a whole tar: {rows}")
        if done == "cut" and data and len(rows) < 5 and not (adopted.damaged or adopted.notes):
            raise WrongSuccess("a tar that was cut is indexed without a word")
        _audited(adopted.index)
        return len(rows) == 5 and not adopted.left_out

    def labels(self, target: str, data: bytes, done: str) -> bool:
        emptied(self._folder / "set")
        (self._folder / _TAR).write_bytes(self._tars["ustar.tar"])
        if target.startswith("cuts"):
            shutil.move(self._folder / _TAR, self._folder / "set" / "recording.000000.tar")
            (self._folder / "set" / target).write_bytes(data)
            spec = IndexConfig()
        else:
            (self._folder / target).write_bytes(data)
            spec = IndexConfig(manifest=str(self._folder / target))
        rows = adopt(str(self._folder / "set"), spec).index.utterances.to_pylist()
        if len(rows) != 5 or (done == "none" and any(row["group"] != row["key"][:2] for row in rows)):
            raise WrongSuccess(f"{len(rows)} of 5 members, groups {[row['group'] for row in rows]}")
        return True


class _Indexed:
    """A folder with an index of its tar and a tar that can be appended."""

    def __init__(self, folder: Path, tar: bytes) -> None:
        emptied(folder)
        (folder / "a.tar").write_bytes(tar)
        (folder / "b.tar").write_bytes(b"no tar")
        self._first = adopt(str(folder), IndexConfig()).index.fingerprint
        (folder / "c.tar").write_bytes(tar)
        self._folder = Folder(folder)
        self.seeds = {name: data for name, data in self._folder.files.items() if not name.endswith(".tar")}

    def again(self, target: str, data: bytes, done: str) -> bool:
        self._folder.put(target, data)
        index = adopt(str(self._folder.root), IndexConfig(), append=True).index
        if index.lineage[-1].fingerprint != self._first or index.count != 10:
            raise WrongSuccess(f"appended to other data: {index.count} utterances")
        # The rows of the tars before are not read, so only an audit finds them damaged.
        return bool(audit(index.base, _AUDIT, run=in_turn)["ok"])


class _StoppedError(Exception):
    """Ends a pack in its middle."""


def _first_only(function: Callable[..., Any], items: Sequence[Any], **options: Any) -> Iterator[Any]:
    """Runs one task and stops, but for the reading of headers."""
    for number, item in enumerate(in_turn(function, items, **options)):
        if number and options["what"] == "packing":
            raise _StoppedError
        yield item


class _Packed:
    """A set that `pack` made, or that it made half: its tar, its index, and what a second pack reads."""

    def __init__(self, scratch: Path, *, stopped: bool = False) -> None:
        emptied(scratch)
        self._source, self._target = corpus(scratch / "in", speakers=2, each=4), scratch / "out"
        (self._source / "bad.wav").write_bytes(b"no audio")
        if stopped:
            with contextlib.suppress(_StoppedError):
                self._pack(_first_only)
            self._folder = Folder(self._target)
            assert any(name.startswith(".packing") for name in self._folder.files)
        self._pack()
        self._folder = self._folder if stopped else Folder(self._target)
        self.seeds = {name: data for name, data in self._folder.files.items() if name.startswith("train/")}
        self.noted = {name: data for name, data in self._folder.files.items() if not name.endswith(".tar")}
        self.tar = next(data for name, data in self.seeds.items() if name.endswith(".tar"))
        whole = Index.load(str(self._target / "train"))
        self._rows, self._fingerprint = whole.utterances.to_pylist(), whole.fingerprint
        self._account = self._pack().account.values()
        self._file = scratch / "own.tar"

    def _pack(self, run: RunTasks = in_turn) -> PackedSets:
        return pack(str(self._source), str(self._target), PackConfig(codec="wav", shard_mb=0.1), run)

    def scan(self, target: str, data: bytes, done: str) -> bool:
        self._file.write_bytes(data)
        entry = scan(self._file, target)
        for row in entry.utterances.to_pylist():
            member = data[row["offset"] : row["offset"] + row["size"]]
            if xxhash.xxh3_64_intdigest(member) != row["checksum"]:
                raise WrongSuccess(f"the row {row} is not what is in the tar")
        entry.row()
        return True

    def audit(self, target: str, data: bytes, done: str) -> bool:
        self._folder.put(target, data)
        index = open_index(str(self._target))
        for _ in index.samples_by_part():
            pass
        found = audit(index.base, _AUDIT, run=in_turn)
        "\n".join(audit_lines(found))
        same = index.fingerprint == self._fingerprint
        if found["ok"]:
            if target.endswith(".tar") and data != self._folder.files[target]:
                raise WrongSuccess("audit finds no problem in a tar that was changed")
            if not same or index.utterances.to_pylist() != self._rows:
                raise WrongSuccess("audit finds no problem in an index that was changed")
        return bool(found["ok"])

    def again(self, target: str, data: bytes, done: str) -> bool:
        self._folder.put(target, data)
        packed = self._pack()
        if packed.splits["train"].fingerprint != self._fingerprint or packed.splits["train"].count != len(self._rows):
            raise WrongSuccess("another pack says that it is complete with other data")
        if packed.account.values() != self._account and target != "quarantine.csv":
            raise WrongSuccess(f"the account is {packed.account.values()}, not {self._account}")
        return True


def _audited(index: Index) -> None:
    found = audit(index.base, _AUDIT, run=in_turn)
    if not found["ok"]:
        raise WrongSuccess(f"audit finds a problem in what was just indexed: {found['problems']}")
