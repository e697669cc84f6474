"""`python -m fuzz [--count N] [--seed S] [--workers W] [--only NUMBER]`: damages N inputs and counts the verdicts."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fuzz import mutate
from fuzz.doors import Door

VERDICTS = ("accepted", "refused", "fault")
_MEMORY_BYTES = 16 << 30
# A process imports and makes what it needs before its first input.
_START_S = 600.0
FOUND = Path(__file__).parents[1] / "data" / "found"


def all_doors(scratch: Path) -> list[Door]:
    """Every door, with its seeds made in `scratch`."""
    from fuzz import audio_doors, run_doors, set_doors, table_doors

    return [door for room in (audio_doors, set_doors, table_doors, run_doors) for door in room.doors(scratch)]


def drawn(doors: list[Door], seed: int, number: int) -> tuple[Door, str, bytes, str]:
    """(door, target, damaged data, what was done) of input `number`."""
    rng = random.Random(f"{seed}/{number}")
    door = rng.choices(doors, [each.weight for each in doors])[0]
    target = rng.choice(sorted(door.seeds))
    data, done = mutate.damaged(rng, door.seeds[target], [door.seeds[name] for name in sorted(door.seeds)], door.text)
    return door, target, data, done


def prepare() -> None:
    """What a process needs that tries inputs: little memory, no log, and warnings of numpy as errors."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    # A traceback of numpy's on stderr is not one line.
    warnings.simplefilter("error", RuntimeWarning)


def _worker(pipe: Connection, seed: int, numbers: list[int], make: Callable[[Path], list[Door]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        doors = make(Path(folder))
        prepare()
        # Decoders of MP3 write to stderr.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for number in numbers:
            door, target, data, done = drawn(doors, seed, number)
            pipe.send((number, "begun", door.name, ""))
            pipe.send((number, *door.verdict(target, data, done)))
        pipe.send(None)


def run(
    seed: int,
    numbers: list[int],
    workers: int,
    make: Callable[[Path], list[Door]] = all_doors,
    hang_s: float = 60.0,
) -> Iterator[tuple[int, str, str, str]]:
    """Yields (number, door, verdict, what happened) of these inputs, tried in processes of their own.

    An input that takes longer than `hang_s`, far more than any needs on a busy machine, hangs.
    """
    context = multiprocessing.get_context("spawn")
    parts = [numbers[at::workers] for at in range(workers)]
    busy: dict[Connection, tuple[Any, list[int], str, float]] = {}

    def start(part: list[int]) -> None:
        if part:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(there, seed, part, make))
            process.start()
            there.close()
            busy[here] = (process, part, "", time.monotonic())

    for part in parts:
        start(part)
    while busy:
        ready = wait(list(busy), timeout=1.0)
        for pipe in list(busy):
            process, part, door, since = busy[pipe]
            hangs = pipe not in ready and time.monotonic() - since > (hang_s if door else _START_S)
            if pipe not in ready and not hangs:
                continue
            del busy[pipe]
            try:
                message = None if hangs else pipe.recv()
            except EOFError:
                hangs = True
            if hangs:
                # A process whose pipe is closed ends by itself.
                process.join(0.0 if pipe not in ready else 5.0)
                ended = process.exitcode
                process.kill()
                process.join()
                if not door:
                    raise RuntimeError(f"a worker ends before its first input ({ended})")
                yield part[0], door, "fault", "a hang" if ended is None else f"the process ended ({ended})"
                start(part[1:])
            elif message is None:
                process.join()
            elif message[1] == "begun":
                busy[pipe] = (process, part, message[2], time.monotonic())
            else:
                yield message[0], door, message[1], message[2]
                busy[pipe] = (process, part[1:], door, time.monotonic())


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="try one input, write it to build/fuzz, and say what happens")
    options = parser.parse_args()
    if options.only is not None:
        return _only(options.seed, options.only)
    counts: Counter[tuple[str, str]] = Counter()
    for number, door, verdict, what in run(options.seed, list(range(options.count)), options.workers):
        counts[door, verdict] += 1
        if counts.total() % 1000 == 0:
            print(f"{counts.total():,} of {options.count:,} tried", file=sys.stderr, flush=True)
        if verdict == "fault":
            print(f"--- input {number} of seed {options.seed}: {door}\n{what.rstrip()}", flush=True)
    print("\n".join(table(counts)))
    return 1 if any(verdict == "fault" for _, verdict in counts) else 0


def table(counts: Counter[tuple[str, str]]) -> Iterator[str]:
    """The lines of the table of verdicts by door."""
    names = sorted({door for door, _ in counts})
    rows = [("door", *VERDICTS), *((name, *(f"{counts[name, verdict]:,}" for verdict in VERDICTS)) for name in names)]
    rows.append(("all", *(f"{sum(counts[name, verdict] for name in names):,}" for verdict in VERDICTS)))
    width = max(len(row[0]) for row in rows)
    for row in rows:
        yield f"{row[0]:{width}}  " + "  ".join(f"{cell:>9}" for cell in row[1:])


def _only(seed: int, number: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        door, target, data, done = drawn(all_doors(Path(folder)), seed, number)
        path = Path("build") / "fuzz" / f"{seed}.{number}~{file_name(door.name)}~{file_name(target)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"{door.name}: {target}, {done}: {path}")
        prepare()
        verdict, what = door.verdict(target, data, done)
        print(f"{verdict}: {what}")
    return verdict == "fault"


def file_name(name: str) -> str:
    """The name of a door or target as a part of a file's name."""
    return name.replace("/", "+").replace(" ", "_")
