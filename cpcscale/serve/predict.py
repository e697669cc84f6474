"""`cpcscale predict MODEL AUDIO...`: a table with a row for each file."""

from __future__ import annotations

import csv
import glob
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from cpcscale import audio, storage
from cpcscale.errors import UserError
from cpcscale.progress import note
from cpcscale.serve.recogniser import COLUMNS, Prediction, load


def predict_files(
    model: str, sources: Sequence[str], out: str = "", *, as_json: bool = False, strict: bool = False
) -> int:
    """Writes a row for each file to the file `out`, or to stdout; returns 1 if any has no value, else 0.

    `sources` as `listed_files` takes them. CSV, or with `as_json` an object a line. With `strict`, what has flags has
    no value. Raises UserError for a model or audio that is not there, and for an `out` that exists.
    """
    if out and storage.exists(out):
        raise UserError(f"{out} exists: remove it, or give --out another name")
    recogniser, files = load(model), list(listed_files(sources))
    text = io.StringIO()
    failed = 0
    for found in _written(recogniser.stream(files, strict=strict), text if out else sys.stdout, as_json):
        failed += bool(found.reason)
    if out:
        storage.write(out, text.getvalue().encode())
    if failed:
        note(f"{failed} of {len(files)} files have no value: the column `reason` says why")
    return 1 if failed else 0


def listed_files(sources: Sequence[str]) -> Iterator[str]:
    """The audio files that a person names: files, folders (all audio below), patterns, @LIST with a file a line.

    Raises UserError for a folder without audio, a pattern that fits nothing and a list that is not there.
    """
    for source in sources:
        if source.startswith("@"):
            yield from listed_files(_lines(source[1:]))
        elif glob.has_magic(source) and storage.local_path(source) is not None and not Path(source).exists():
            root = Path(Path(source).anchor)
            try:
                found = sorted(map(str, root.glob(str(Path(source).relative_to(root)))))
            except ValueError as error:
                raise UserError(f"{source} is no pattern ({error})") from None
            if not found:
                raise UserError(f"no file fits the pattern {source}")
            yield from listed_files(found)
        elif source.lower().endswith(audio.SUFFIXES) or _is_file(source):
            yield source
        elif below := [name for name in storage.list_files(source) if name.lower().endswith(audio.SUFFIXES)]:
            yield from (storage.join(source, name) for name in below)
        else:
            raise UserError(f"no audio at {source}: expected files ending in {', '.join(audio.SUFFIXES)}")


def _is_file(source: str) -> bool:
    local = storage.local_path(source)
    return local is not None and local.is_file()


def _lines(path: str) -> list[str]:
    """The names in a list; a list in a list is refused, for it may be the same one."""
    try:
        lines = [line.strip() for line in storage.read(path).decode("utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is no list of files in UTF-8: write one name a line") from None
    if inner := next((line for line in lines if line.startswith("@")), ""):
        raise UserError(f"{path} names another list, {inner}: give both to the command")
    return [line for line in lines if line]


def _written(found: Iterator[Prediction], out: TextIO, as_json: bool) -> Iterator[Prediction]:
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    if not as_json:
        writer.writeheader()
    for each in found:
        if as_json:
            out.write(json.dumps({name: None if cell == "" else cell for name, cell in each.row().items()}) + "\n")
        else:
            writer.writerow(each.row())
        yield each
