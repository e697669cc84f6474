"""A few hundred damaged inputs, and every one that was ever found to break a door: see fuzz/__init__.py."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpcscale.errors import UserError
from fuzz import runner
from fuzz.doors import Door, WrongSuccess

FOUND = sorted(path.name for path in runner.FOUND.iterdir())
COUNT = 200


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Door]]:
    made = runner.all_doors(tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield made
    logging.disable(logging.NOTSET)


def test_damaged_inputs_are_true_or_refused_in_one_line(doors):
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    for number in range(COUNT):
        door, target, data, done = runner.drawn(doors, 17, number)
        verdict, what = door.verdict(target, data, done)
        counts[door.name, verdict] += 1
        if verdict == "fault":
            faults.append(f"input {number}: {door.name}, {target}: {what}")
    assert not faults, "\n".join(faults)
    # All doors are tried, and damage is neither let through nor all that there is.
    assert {name for name, _ in counts} == {door.name for door in doors}
    assert min(sum(n for (_, verdict), n in counts.items() if verdict == kind) for kind in ("accepted", "refused")) > 20


def without_hash(name: str) -> str:
    return re.sub("[0-9a-f]{8,}", "", name)


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(doors, name):
    """A file is named WHAT IT SHOWED~DOOR~TARGET, with / as +."""
    _, door_name, target = name.split("~")
    (door,) = [door for door in doors if runner.file_name(door.name) == door_name]
    # The names of an index's tables hold a hash.
    (target,) = [each for each in door.seeds if without_hash(runner.file_name(each)) == without_hash(target)]
    verdict, what = door.verdict(target, (runner.FOUND / name).read_bytes(), "changed")
    assert verdict != "fault", what


@pytest.mark.parametrize(
    ("error", "done", "expected"),
    [
        (UserError("x.csv line 3 has 2 cells"), "changed", "refused"),
        (UserError("x.csv\x1b[31m holds\0 what\nno line can"), "changed", "refused"),
        (UserError(""), "changed", "fault"),
        (UserError("a whole file"), "none", "fault"),
        (KeyError("path"), "changed", "fault"),
        (MemoryError(), "changed", "fault"),
        (RecursionError(), "changed", "fault"),
        (WrongSuccess("0.6 of 6 s"), "changed", "fault"),
        (None, "changed", "accepted"),
    ],
)
def test_a_verdict_is_as_the_door_behaves(error, done, expected):
    def enter(target: str, data: bytes, done: str) -> bool:
        if error is not None:
            raise error
        return True

    assert Door("a door", {}, enter).verdict("a", b"", done)[0] == expected


def broken_doors(scratch: Path) -> list[Door]:
    def enter(target: str, data: bytes, done: str) -> bool:
        if target == "ends":
            os.kill(os.getpid(), signal.SIGKILL)
        if target == "hangs":
            time.sleep(3600)
        return True

    return [Door("a door", {"ends": b"", "hangs": b"", "works": b""}, enter)]


def test_a_process_that_ends_or_hangs_is_a_fault_of_its_input_and_the_others_are_tried(tmp_path):
    doors = broken_doors(tmp_path)
    by_target = {runner.drawn(doors, 0, number)[1]: number for number in range(50)}
    numbers = [by_target["ends"], by_target["hangs"], by_target["works"]]
    found = list(runner.run(0, numbers, 1, make=broken_doors, hang_s=2.0))
    assert found == [
        (numbers[0], "a door", "fault", f"the process ended ({-signal.SIGKILL})"),
        (numbers[1], "a door", "fault", "a hang"),
        (numbers[2], "a door", "accepted", ""),
    ]
