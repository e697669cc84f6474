"""`cpcscale predict MODEL AUDIO...`: a table with a row for each file, utterance or segment, made part by part."""

from __future__ import annotations

import contextlib
import dataclasses
import posixpath
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from cpcscale import __version__, audio, storage
from cpcscale.errors import UserError
from cpcscale.progress import Progress, note
from cpcscale.serve.folder import read_recogniser, recogniser_of
from cpcscale.serve.inputs import Inputs, Part, find_inputs, read_part
from cpcscale.serve.job import Job, is_unread, part_name, read_rows, write_rows
from cpcscale.serve.recogniser import Prediction, Recogniser, load, spans_asked
from cpcscale.serve.table import Row, check_place, csv_lines, json_lines
from cpcscale.shards.index import Index
from cpcscale.shards.tasks import RunTasks

# Keeps a place to this process, by its URL, for a block.
Hold: TypeAlias = "Callable[[str], contextlib.AbstractContextManager[object]]"
# Draws the predictions of one input: draw(url of the PNG, its name, samples, predictions).
Draw: TypeAlias = "Callable[[str, str, audio.Samples, list[Prediction]], None]"


@dataclass(frozen=True)
class Asked:
    """What is to be done with each input: `segments` are the seconds of each; `plots` a PNG, or a folder of them.

    `strict`: what has flags has no value. `device`: where networks run, cpu or cuda.
    """

    segments: float | None = None
    strict: bool = False
    plots: str = ""
    draw: Draw | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Predicted:
    """How many inputs there were, and how many of them have no value at all."""

    inputs: int
    without_value: int
    rows: int


@dataclass(frozen=True)
class _Work:
    """What all tasks share. `folder` is where parts are published; without one, tasks return their rows.

    `files` are those of the model, if not all processes can read it.
    """

    model: str
    digest: str
    files: Mapping[str, bytes]
    asked: Asked
    sets: Mapping[str, Index]
    folder: str


def predict_files(
    model: str,
    sources: Sequence[str],
    out: str = "",
    *,
    asked: Asked | None = None,
    run: RunTasks | None = None,
    run_parts: RunTasks | None = None,
    send: bool = False,
    hold: Hold = contextlib.nullcontext,
    force: bool = False,
    as_json: bool = False,
) -> Predicted:
    """Writes the table of all inputs to the file `out` as its suffix says, or to stdout as CSV or JSON lines.

    `sources` as `listed_files` takes them. `run` works on several parts at a time, or `run_parts` if that is given, and
    then `run` only reads headers; the bytes are the same however many. `send` sends them the model, which they may not
    be able to read. With `out` the job goes on after any end; `hold` keeps it to this process. Raises UserError for a
    model or audio that is not there, and for an `out` or plots that exist, unless `force` is given.
    """
    asked = asked or Asked()
    # A mistake is said before a job begins.
    spans_asked(asked.segments)
    if asked.plots:
        asked = dataclasses.replace(asked, plots=storage.absolute(asked.plots))
    if out:
        check_place(out)
        if storage.in_job_folder(out):
            note(f"--out {out} lies in the job's temporary folder: name an absolute path or s3:// to keep it")
    model = storage.absolute(model)
    loaded = load(model)
    # What works on parts may be elsewhere, and have a GPU that is not here.
    if run_parts is None:
        _keep(loaded, asked.device)
    run = run or _in_turn
    found = find_inputs(sources, run)
    if found.excluded:
        note(f"{found.excluded:,} utterances that their index excludes are left out")
    work = _Work(model, loaded.digest, read_recogniser(model) if send else {}, asked, found.sets, "")
    apply = partial(run_parts or run, predict_part, what="predicting", unit="parts")
    if not out:
        if asked.draw:
            _check_plots(asked.plots, found.count, may_exist=force)
        counted = _print(apply(found.parts, shared=(work,)), loaded.columns, as_json)
    else:
        with hold(out):
            job = _job(out, work, sources, found)
            if asked.draw:
                _check_plots(asked.plots, found.count, may_exist=force or job.goes_on)
            done = job.begin(force=force)
            work = dataclasses.replace(work, folder=storage.absolute(job.parts))
            if todo := [part for part in found.parts if part_name(part) not in done]:
                for _ in apply(todo, shared=(work,)):
                    pass
            counted = Predicted(**job.end(loaded.columns, [part_name(part) for part in found.parts]))
    if counted.without_value:
        note(f"{counted.without_value} of {counted.inputs} files have no value: the column `reason` says why")
    return counted


def predict_part(part: Part, work: _Work, seen: Callable[[], None] = lambda: None) -> list[list[Row]]:
    """The rows of each input of a part; none if they are published. `seen` is called after each input."""
    asked, recogniser = work.asked, _recogniser(work)
    # Of an earlier start, if a file of it could not be read then.
    before = read_rows(work.folder, part) if work.folder else []
    found: list[list[Row]] = []
    # On one thread: sums in another order have other last bits.
    with _one_thread():
        for number, (name, path, data) in enumerate(read_part(part, work.sets.get(part.base)), part.first):
            if before and not is_unread(known := before[number - part.first]):
                found.append(known)
                seen()
                continue
            look = partial(asked.draw, _plot_url(asked.plots, number, name), name) if asked.draw else None
            predictions = recogniser.rows(path, data, strict=asked.strict, segments=asked.segments, look=look)
            found.append([dataclasses.replace(each, file=name).row() for each in predictions])
            seen()
    if not work.folder:
        return found
    write_rows(work.folder, part, found)
    return []


def _in_turn(
    function: Callable[..., Any], items: Sequence[Any], *, what: str, unit: str, shared: tuple[Any, ...] = ()
) -> Iterator[Any]:
    """The RunTasks of this process alone, whose progress of parts is that of their inputs."""
    if not shared:
        yield from map(function, items)
        return
    done, total = 0, sum(part.count for part in items)
    with Progress(what, total, "files") as progress:

        def seen() -> None:
            nonlocal done
            done += 1
            progress.update(done)

        for item in items:
            yield function(item, *shared, seen)


# The recogniser of this process, by its digest and device: it is loaded once for all parts.
_kept: dict[tuple[str, str], Recogniser] = {}


def _keep(recogniser: Recogniser, device: str) -> None:
    _kept.clear()
    _kept[recogniser.digest, device] = recogniser.to(device)


def _recogniser(work: _Work) -> Recogniser:
    """The recogniser of the work. Raises UserError if there is another one in its place by now."""
    digest, device = work.digest, work.asked.device
    if (digest, device) not in _kept:
        if work.files:
            found = Recogniser(recogniser_of(work.model, work.files, digest))
        elif (found := load(work.model)).digest != digest:
            raise UserError(f"{work.model} was changed while it is applied: start again")
        _keep(found, device)
    return _kept[digest, device]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _job(out: str, work: _Work, sources: Sequence[str], found: Inputs) -> Job:
    asked = work.asked
    identity = {
        "version": __version__,
        "model": work.digest,
        "audio": found.digest,
        "segments_s": asked.segments,
        "strict": asked.strict,
        "plots": asked.plots,
        "device": asked.device,
    }
    return Job(out, identity, {"model_path": work.model, "sources": list(sources), "parts": len(found.parts)})


def _print(made: Any, columns: Sequence[str], as_json: bool) -> Predicted:
    inputs = without_value = rows = 0

    def flat() -> Iterator[Row]:
        nonlocal inputs, without_value, rows
        for part in made:
            for found in part:
                inputs += 1
                without_value += all(row["reason"] for row in found)
                rows += len(found)
                yield from found

    for line in json_lines(flat()) if as_json else csv_lines(columns, flat()):
        sys.stdout.write(line)
    return Predicted(inputs, without_value, rows)


def _check_plots(plots: str, count: int, *, may_exist: bool) -> None:
    """Raises UserError for a PNG of several inputs, and for plots that exist, unless they may."""
    if _is_png(plots) and count != 1:
        raise UserError(f"--plot {plots} is one PNG, and there are {count} inputs: name a folder")
    if not may_exist and storage.exists(plots) and (_is_png(plots) or storage.list_files(plots)):
        raise UserError(f"--plot {plots} exists: give --force to replace what is there, or another name")


def _plot_url(plots: str, number: int, name: str) -> str:
    return plots if _is_png(plots) else storage.join(plots, f"{number:06d}-{posixpath.basename(name)}.png")


def _is_png(plots: str) -> bool:
    return plots.lower().endswith(".png")
