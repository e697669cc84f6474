"""Promises about memory: it grows with the names of the files, not with their audio, nor with objects kept for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from object_store import ObjectStore
from trees import noise

from cpcscale import storage

Run = Callable[..., tuple[int, list[str]]]

# The most memory that the process ever held, in bytes.
HELD = """
from pathlib import Path
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
"""
PACK = (
    HELD
    + """
from cpcscale.shards.pack import PackConfig, pack
packed = pack({source!r}, {target!r}, PackConfig(shard_mb=4))
assert not packed.quarantine
print(packed.splits["train"].count, held())
"""
)
# Pass 1 and the assignment of `count` files that are nowhere: what finds and probes them is stood in for.
ASSIGN = (
    HELD
    + """
import tempfile
import numpy as np
from cpcscale import storage
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.packing.headers import ReadHeaders, read_headers

def names(root):
    return [f"part-{{n % 97:03d}}/speaker-{{n % 9973:06d}}/recording-{{n:012d}}.flac" for n in range({count})]

class Done(BaseException):
    pass

def run(function, items, **words):
    if function is read_headers:
        for chunk in items:
            yield ReadHeaders(np.full(len(chunk), 160_000, np.int64), [])
        return
    assert items[len(items) - 1].members
    print(len(items), held())
    raise Done

storage.list_files = names
config = PackConfig(group_from="folder", folder_level=2, heldout_share=0.02, heldout_by="utterance")
try:
    pack({source!r}, {target!r}, config, run)
except Done:
    pass
"""
)
NAME_BYTES = 51


def held(run_python: Run, text: str) -> tuple[int, int]:
    """(what the text counted, the most memory that its process held)."""
    status, lines = run_python(text)
    assert status == 0, lines
    count, most = map(int, lines[-1].split())
    return count, most


def recording(path: Path, minutes: int) -> Path:
    path.parent.mkdir()
    minute = noise(60, seed=minutes)
    with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as file:
        for _ in range(minutes):
            file.write(minute)
    return path


@pytest.mark.parametrize("place", ["disk", "store"])
def test_a_recording_ten_times_as_long_takes_no_more_memory(tmp_path, run_python: Run, s3: ObjectStore, place):
    most = {}
    for minutes in (4, 40):
        path = recording(tmp_path / f"{minutes}" / "a.flac", minutes)
        source = str(path.parent)
        if place == "store":
            source = storage.join(s3.base, tmp_path.name, f"{minutes}")
            storage.write(storage.join(source, "a.flac"), path.read_bytes())
        target = tmp_path / f"shards{minutes}"
        count, most[minutes] = held(run_python, PACK.format(source=source, target=str(target)))
        assert count == minutes
        assert len(list((target / "train").glob("*.tar"))) > minutes / 8
    # The signal of 36 minutes is 138 MB; a few MB are what two runs of the same differ by.
    assert most[40] - most[4] < 24e6


def test_a_file_costs_less_than_300_bytes_and_its_name(tmp_path, run_python: Run):
    most = {}
    for count in (50_000, 250_000):
        text = ASSIGN.format(count=count, source=str(tmp_path), target=str(tmp_path / f"{count}"))
        tasks, most[count] = held(run_python, text)
        assert tasks > count // 400
    assert (most[250_000] - most[50_000]) / 200_000 < 300 + NAME_BYTES
