"""`cpcscale predict MODEL AUDIO...`: a table with a row for each file, utterance or segment, made part by part."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import posixpath
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch

from cpcscale import __version__, audio, storage
from cpcscale.errors import UserError
from cpcscale.progress import Progress, note
from cpcscale.serve.inputs import Inputs, Part, find_inputs, read_part
from cpcscale.serve.job import Job
from cpcscale.serve.recogniser import COLUMNS, Prediction, Recogniser, load, spans_asked
from cpcscale.serve.table import Row, check_place, csv_lines, json_lines
from cpcscale.shards.index import Index
from cpcscale.shards.tasks import RunTasks

# Draws the predictions of one input: draw(url of the PNG, its name, samples, predictions).
Draw: TypeAlias = "Callable[[str, str, audio.Samples, list[Prediction]], None]"


@dataclass(frozen=True)
class Asked:
    """What is to be done with each input: `segments` are the seconds of each; `plots` a PNG, or a folder of them.

    `strict`: what has flags has no value.
    """

    segments: float | None = None
    strict: bool = False
    plots: str = ""
    draw: Draw | None = None


@dataclass(frozen=True)
class Predicted:
    """How many inputs there were, and how many of them have no value at all."""

    inputs: int
    without_value: int
    rows: int


@dataclass(frozen=True)
class _Work:
    """What all tasks share. `folder` is where parts are published; without one, tasks return their rows."""

    model: str
    digest: str
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
    force: bool = False,
    as_json: bool = False,
) -> Predicted:
    """Writes the table of all inputs to the file `out` as its suffix says, or to stdout as CSV or JSON lines.

    `sources` as `listed_files` takes them. `run` works on several parts at a time; the bytes are the same however many.
    With `out` the job goes on after any end. Raises UserError for a model or audio that is not there, and for an `out`
    or plots that exist, unless `force` is given.
    """
    asked = asked or Asked()
    # A mistake is said before a job begins.
    spans_asked(asked.segments)
    if asked.plots:
        asked = dataclasses.replace(asked, plots=storage.absolute(asked.plots))
    if out:
        check_place(out)
    model = storage.absolute(model)
    _loaded.cache_clear()
    digest = _loaded(model).digest
    run = run or _in_turn
    found = find_inputs(sources, run)
    if found.excluded:
        note(f"{found.excluded:,} utterances that their index excludes are left out")
    job = _job(out, model, digest, sources, found, asked) if out else None
    if asked.draw:
        _check_plots(asked.plots, found.count, may_exist=force or (job is not None and job.goes_on))
    done = job.begin(force=force) if job else set()
    todo = [part for part in found.parts if _part_name(part) not in done]
    folder = storage.absolute(job.parts) if job else ""
    work = _Work(model, digest, asked, found.sets, folder)
    made = run(predict_part, todo, what="predicting", unit="parts", shared=(work,)) if todo else ()
    if job is None:
        counted = _print(made, as_json)
    else:
        for _ in made:
            pass
        counted = Predicted(**job.end(COLUMNS, [_part_name(part) for part in found.parts]))
    if counted.without_value:
        note(f"{counted.without_value} of {counted.inputs} files have no value: the column `reason` says why")
    return counted


def predict_part(part: Part, work: _Work, seen: Callable[[], None] = lambda: None) -> list[list[Row]]:
    """The rows of each input of a part; none if they are published. `seen` is called after each input."""
    recogniser = _recogniser(work.model, work.digest)
    asked = work.asked
    found: list[list[Row]] = []
    # On one thread: sums in another order have other last bits.
    with _one_thread():
        for number, (name, path, data) in enumerate(read_part(part, work.sets.get(part.base)), part.first):
            look = partial(asked.draw, _plot_url(asked.plots, number, name), name) if asked.draw else None
            predictions = recogniser.rows(path, data, strict=asked.strict, segments=asked.segments, look=look)
            found.append([dataclasses.replace(each, file=name).row() for each in predictions])
            seen()
    if not work.folder:
        return found
    lines = "".join(f"{json.dumps(rows)}\n" for rows in found)
    storage.write(storage.join(work.folder, _part_name(part)), lines.encode())
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


# Once in each process.
_loaded = lru_cache(maxsize=1)(load)


def _recogniser(model: str, digest: str) -> Recogniser:
    """The recogniser of this digest. Raises UserError if there is another one by now."""
    if _loaded(model).digest != digest:
        # This process may have served an earlier job.
        _loaded.cache_clear()
        if _loaded(model).digest != digest:
            raise UserError(f"{model} was changed while it is applied: start again")
    return _loaded(model)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _job(out: str, model: str, digest: str, sources: Sequence[str], found: Inputs, asked: Asked) -> Job:
    identity = {
        "version": __version__,
        "model": digest,
        "audio": found.digest,
        "segments_s": asked.segments,
        "strict": asked.strict,
        "plots": asked.plots,
    }
    return Job(out, identity, {"model_path": model, "sources": list(sources), "parts": len(found.parts)})


def _print(made: Any, as_json: bool) -> Predicted:
    inputs = without_value = rows = 0

    def flat() -> Iterator[Row]:
        nonlocal inputs, without_value, rows
        for part in made:
            for found in part:
                inputs += 1
                without_value += all(row["reason"] for row in found)
                rows += len(found)
                yield from found

    for line in json_lines(flat()) if as_json else csv_lines(COLUMNS, flat()):
        sys.stdout.write(line)
    return Predicted(inputs, without_value, rows)


def _part_name(part: Part) -> str:
    return f"{part.number:06d}.jsonl"


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
