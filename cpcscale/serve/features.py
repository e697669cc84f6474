"""`cpcscale features MODEL AUDIO... --out PLACE`: the frames of an encoder, a file of arrays each or one table."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpcscale import config, storage
from cpcscale.errors import AudioError, UserError
from cpcscale.progress import Progress, note
from cpcscale.serve.encoder import Encoder, Frames
from cpcscale.serve.folder import is_taken
from cpcscale.serve.inputs import is_set, listed_files
from cpcscale.serve.models import load_encoder

TABLE = ".parquet"
INDEX = "index.csv"
COLUMNS = ("file", "npy", "layer", "frames", "first_s", "hop_s", "reason")


def write_features(model: str, sources: Sequence[str], out: str, *, layer: str = "c", force: bool = False) -> int:
    """Writes the frames of each file to `out`, and returns 1 if any file has none, else 0.

    `out` is a file ending in .parquet (a row a frame: file, time_s, frame), or else a folder: a float32 array [T, C]
    for each file in NumPy's format, under the file's own name, and index.csv, written last, with the time of the first
    frame and between frames. `sources` as `listed_files` takes them.

    Raises UserError for a model, audio or layer that is not there, and for an `out` that exists, unless `force`.
    """
    encoder = load_encoder(model)
    encoder.width(layer)
    files = list(dict.fromkeys(listed_files(sources)))
    if found := next(filter(is_set, files), ""):
        raise UserError(f"{found} is a shard set, and `features` takes files: name the audio that it was packed from")
    as_table = out.lower().endswith(TABLE)
    local = storage.local_path(out)
    if as_table and local is not None and local.is_dir():
        raise UserError(f"{out} is a folder: name a file for the table, or a folder that does not end in {TABLE}")
    if not force and is_taken(out):
        raise UserError(f"{out} exists: give --out another name, or replace it with --force")
    write = _write_table if as_table else _write_arrays
    failed = write(encoder, files, layer, out)
    if failed:
        note(f"{failed} of {len(files)} files have no features")
    return 1 if failed else 0


def _encoded(encoder: Encoder, files: Sequence[str], layer: str) -> Iterator[tuple[str, Frames | AudioError]]:
    """(file, its frames or why it has none), one after the other; says the latter on stderr."""
    with Progress("encoding", len(files), "files") as progress:
        for done, file in enumerate(files, 1):
            try:
                yield file, encoder.encode(file, layer=layer)
            except UserError as error:
                # A store that fails is no matter of one file.
                if not isinstance(error, AudioError | storage.NotFoundError) and storage.local_path(file) is None:
                    raise
                note(f"{file}: {error}")
                cause = error.cause if isinstance(error, AudioError) else "unreadable"
                cause = "missing" if isinstance(error, storage.NotFoundError) else cause
                yield file, AudioError(cause, str(error))
            progress.update(done)


def _write_arrays(encoder: Encoder, files: Sequence[str], layer: str, out: str) -> int:
    storage.remove(storage.join(out, INDEX))
    text, failed = io.StringIO(), 0
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    rows.writeheader()
    names = _names(files)
    for file, found in _encoded(encoder, files, layer):
        if isinstance(found, AudioError):
            failed += 1
            rows.writerow({"file": file, "layer": layer, "reason": found.cause})
            continue
        data = io.BytesIO()
        np.save(data, found.frames)
        storage.write(storage.join(out, names[file]), data.getvalue())
        times = {"first_s": encoder.first_s, "hop_s": encoder.hop_s}
        rows.writerow({"file": file, "npy": names[file], "layer": layer, "frames": len(found.frames), **times})
    storage.write(storage.join(out, INDEX), text.getvalue().encode())
    return failed


def _write_table(encoder: Encoder, files: Sequence[str], layer: str, out: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = pa.list_(pa.float32(), encoder.width(layer))
    about = {"layer": layer, "encoder": config.redact(encoder.source["url"]), "hop_s": str(encoder.hop_s)}
    schema = pa.schema([("file", pa.string()), ("time_s", pa.float64()), ("frame", frame)], metadata=about)
    failed = 0
    with storage.publishing(out) as temporary, pq.ParquetWriter(temporary, schema) as table:
        for file, found in _encoded(encoder, files, layer):
            if isinstance(found, AudioError):
                failed += 1
                continue
            values: Any = pa.FixedSizeListArray.from_arrays(pa.array(found.frames.ravel()), type=frame)
            columns = [pa.array([file] * len(found.frames)), pa.array(found.times_s), values]
            table.write_table(pa.Table.from_arrays(columns, schema=schema))
    return failed


def _names(files: Sequence[str]) -> dict[str, str]:
    """The name of the array of each file: its path below the folder that all have in common, with .npy behind."""
    places = {file: re.sub("^s3://", "/s3/", storage.absolute(file)) for file in files}
    above = os.path.commonpath([str(Path(place).parent) for place in places.values()])
    return {file: f"{Path(place).relative_to(above).as_posix()}.npy" for file, place in places.items()}
