"""Damaged tables, manifests and label files against pack, finetune and `corpus describe`."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import made_corpora
import pyarrow as pa
from trees import noise, write_tree

from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig
from cpcscale.emotion.scores.describe import describe
from cpcscale.report.terminal.corpus import corpus_lines
from cpcscale.shards.packing.sources import FindConfig, find_audio
from cpcscale.tables import PATHS, Table
from fuzz.doors import Door, Folder, WrongSuccess, emptied

_HEAD = "path,speaker,activation,valence,dominance,language,partition,category"
_ROWS = [f"a/u{n}.wav,s{n % 3},{1 + n % 5},{1.5 + n % 3},3,en,train,neutral" for n in range(6)]
_PARTS = [f"a/u0.wav,{n / 10},{(n + 4) / 10},s{n},{1 + n},2,3" for n in range(4)]


def doors(scratch: Path) -> list[Door]:
    """The reader of tables, a manifest of `pack`, tables of ratings, and the label files of each corpus."""
    plain = "\n".join([_HEAD, *_ROWS]) + "\n"
    records = [dict(zip(_HEAD.split(","), row.split(","), strict=True)) for row in _ROWS]
    quoted = io.StringIO()
    csv.writer(quoted, quoting=csv.QUOTE_ALL).writerows(line.split(",") for line in [_HEAD, *_ROWS])
    tables = {
        "plain.csv": plain.encode(),
        "tabs.tsv": plain.replace(",", "\t").encode(),
        "semicolons.csv": plain.replace(",", ";").encode(),
        "quoted.csv": quoted.getvalue().encode(),
        "packed.csv.gz": gzip.compress(plain.encode(), mtime=0),
        "lines.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode(),
    }
    head = "path,start,end,speaker,activation,valence,dominance"
    rated = {**tables, "parts.csv": "\n".join([head, *_PARTS, ""]).encode()}
    labelled = [_Labelled(scratch / "corpora", kind) for kind in _CORPORA]
    seeds = {f"{one.kind}/{name}": data for one in labelled for name, data in one.seeds.items()}
    by_kind = {one.kind: one for one in labelled}
    return [
        Door("table", tables, _Tables(emptied(scratch / "tables"), records).enter, text=True, weight=2),
        Door("ratings", rated, _Rated(scratch / "rated").enter, text=True, weight=3),
        Door("manifest", tables, _Manifests(scratch / "manifests").enter, text=True),
        Door(
            "label file",
            seeds,
            lambda target, data, done: by_kind[target.partition("/")[0]].enter(target.partition("/")[2], data, done),
            text=True,
            weight=2,
        ),
    ]


class _Tables:
    def __init__(self, folder: Path, records: list[dict[str, str]]) -> None:
        self._folder, self._records = folder, records

    def enter(self, target: str, data: bytes, done: str) -> bool:
        path = self._folder / target
        path.write_bytes(data)
        table = Table(str(path))
        rows = [{column: row[column] for column in table.columns} for row in table.rows()]
        batches = [cells for batch in table.batches(table.columns) for cells in zip(*batch, strict=True)]
        # In JSON lines a.b is the key b inside of a, too; of columns without a name the first is meant.
        plain = not target.endswith("jsonl") and len(set(table.columns)) == len(table.columns)
        if plain and batches != [tuple(row.values()) for row in rows]:
            raise WrongSuccess("rows and batches of one table differ")
        if done == "none" and rows != self._records:
            raise WrongSuccess(f"{rows} is not what was written")
        for row in rows:
            for text in row.values():
                text.encode()
        return True


def _audio(root: Path) -> Path:
    return write_tree(emptied(root), {f"a/u{n}.wav": noise(0.8, n) for n in range(6)})


class _Rated:
    """A table of ratings in a folder with its audio."""

    def __init__(self, root: Path) -> None:
        self._folder = Folder(_audio(root))

    def enter(self, target: str, data: bytes, done: str) -> bool:
        self._folder.put(target, data)
        path = self._folder.root / target
        path.write_bytes(data)
        corpus = open_corpus(CorpusConfig(path=str(path), on_bad="skip", kind="csv"))
        _sane(corpus)
        if b'"' not in data and target in ("plain.csv", "parts.csv"):
            self._same_labels(corpus, data)
        if done == "none" and len(corpus.utterances) != (4 if target == "parts.csv" else 6):
            raise WrongSuccess(f"{len(corpus.utterances)} rows of a whole table")
        _described(corpus)
        return not corpus.dropped

    @staticmethod
    def _same_labels(corpus: Corpus, data: bytes) -> None:
        """The labels are those of the line, read in the plainest way."""
        lines = data.decode().lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        lines = [line for line in lines if line.strip()]
        mark = max("\t,;", key=lambda each: (each == "\t" and each in lines[0], lines[0].count(each)))
        head = [cell.strip() for cell in lines[0].split(mark)]
        path = next(name for name in PATHS if name in head)
        rows = [[cell.strip() for cell in line.split(mark)] for line in lines[1:]]
        wanted = {
            (cells[head.index(path)], tuple(float(cells[head.index(name)]) for name in head if name in _RATINGS))
            for cells in rows
            if any(cells)
        }
        order = [_RATINGS.index(name) for name in head if name in _RATINGS]
        for one in corpus.utterances:
            labels = tuple(one.labels[at] for at in order)
            if not any(one.path.endswith(name.lstrip("./")) and labels == values for name, values in wanted):
                raise WrongSuccess(f"{one.key} has labels {labels}, which no line says of {one.path}")
        if len(corpus.utterances) + len(corpus.dropped) < len(wanted):
            raise WrongSuccess(f"{len(wanted)} rows became {len(corpus.utterances)}")


_RATINGS = ("activation", "valence", "dominance")


class _Manifests:
    """A manifest of `pack`, given and beside the audio."""

    def __init__(self, root: Path) -> None:
        self._folder = Folder(_audio(root))

    def enter(self, target: str, data: bytes, done: str) -> bool:
        beside = target in ("plain.csv", "tabs.tsv")
        name = f"manifest{target[-4:]}" if beside else target
        self._folder.put(name, data)
        path = self._folder.root / name
        path.write_bytes(data)
        found = find_audio(str(self._folder.root), FindConfig(manifest="" if beside else str(path)))
        if len(found) != 6:
            raise WrongSuccess(f"{len(found)} of 6 files are found")
        groups = [one.group for one in found]
        pa.array(groups, pa.string())
        if done == "none" and groups != [f"s{n % 3}" for n in range(6)]:
            raise WrongSuccess(f"groups {groups}")
        return True


_CORPORA: dict[str, Callable[[Path], Path]] = {
    "iemocap": lambda root: made_corpora.put_iemocap(root, sessions=1, turns=1),
    "msp-podcast": lambda root: made_corpora.put_msp_podcast(root, podcasts=2, segments=2),
    "msp-podcast-json": lambda root: made_corpora.put_msp_podcast(
        root, podcasts=2, segments=2, consensus="labels_consensus.json", detailed="labels_detailed.json"
    ),
    "msp-podcast-txt": lambda root: made_corpora.put_msp_podcast(root, podcasts=2, segments=2, detailed="labels.txt"),
    "msp-improv": lambda root: made_corpora.put_msp_improv(root, sessions=1, turns=2),
    "crema-d": lambda root: made_corpora.put_crema_d(root, actors=1),
}


class _Labelled:
    """A corpus as its owners ship it, of which one label file is damaged."""

    def __init__(self, root: Path, kind: str) -> None:
        self.kind = kind
        self._folder = Folder(_CORPORA[kind](emptied(root / kind)))
        self.seeds = {name: data for name, data in self._folder.files.items() if not name.endswith(".wav")}
        self._whole = open_corpus(self._settings())

    def _settings(self) -> CorpusConfig:
        kind = "msp-podcast" if self.kind.startswith("msp-podcast") else self.kind
        return CorpusConfig(path=str(self._folder.root), kind=kind, on_bad="skip")

    def enter(self, target: str, data: bytes, done: str) -> bool:
        self._folder.put(target, data)
        corpus = open_corpus(self._settings())
        _sane(corpus)
        if done == "none" and corpus.digest != self._whole.digest:
            raise WrongSuccess("a whole corpus has another digest")
        known = {one.key: one for one in self._whole.utterances}
        lost = known.keys() - {one.key for one in corpus.utterances}
        if lost and not corpus.dropped and done == "cut" and not self.kind.startswith(("msp-improv", "msp-podcast")):
            raise WrongSuccess(f"{lost} are gone without a word")
        _described(corpus)
        return corpus.digest == self._whole.digest


def _sane(corpus: Corpus) -> None:
    for one in corpus.utterances:
        if not all(math.isfinite(value) for value in one.labels):
            raise WrongSuccess(f"labels {one.labels} of {one.key}")
        for text in (one.key, one.speaker, one.language, one.gender, one.partition, one.category, one.recording):
            text.encode()


def _described(corpus: Corpus) -> None:
    values = describe(corpus)
    json.dumps(values, allow_nan=False)
    for line in corpus_lines(values):
        line.encode()
