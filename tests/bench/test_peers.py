"""Every peer that is installed delivers real windows and ends cleanly, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from commands import long

from cpcscale import audio
from cpcscale.bench import peers
from cpcscale.bench.peers.job import CropDecoder, PeerJob
from cpcscale.errors import UserError

UTTERANCES, SAMPLES, WINDOW = 24, 3_000, 2_000
# The peers, and the module that tells whether one is installed.
MODULES = {
    "webdataset": "webdataset",
    "lhotse": "lhotse",
    "ray.data": "ray",
    "litdata": "litdata",
    "mosaicml-streaming": "streaming",
}
# One measurement, as the bench makes it, with its batches kept; prints the seconds and what it left behind.
MEASURE = """
import contextlib, json, os, re, sys, threading
from pathlib import Path
import numpy as np
import psutil
from cpcscale.bench import peers
from cpcscale.bench.peers.job import PeerJob

def measure(name, kept, values):
    job = PeerJob(**{**values, "folder": Path(values["folder"])})
    shared = set(Path("/dev/shm").glob("*"))
    opened, batches = peers.installed_peers()[name], []

    @contextlib.contextmanager
    def keeping(job):
        with opened(job) as start:
            yield lambda: (batches.append(np.asarray(batch).copy()) or batch for batch in start())

    peers.installed_peers = lambda: {name: keeping}
    seconds = peers.peer_measurements(job)[name]()
    np.save(kept, np.concatenate(batches))
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    # Python's own, one for the life of a process that ever spawned another.
    children = [command for command in children if "multiprocessing.resource_tracker" not in command]
    threads = [thread.name for thread in threading.enumerate() if not thread.daemon][1:]
    # Ours are those of PyTorch with our number and those of mosaicml: others' come and go meanwhile.
    mine = re.compile(rf"torch_{os.getpid()}_|[0-9]{{6}}_")
    litter = [path.name for path in set(Path("/dev/shm").glob("*")) - shared if mine.match(path.name)]
    print(json.dumps({"seconds": seconds, "children": children, "threads": threads, "litter": litter}))

if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def waves() -> np.ndarray:
    """int16 [utterances, samples] of noise, so that any few samples tell where they are from."""
    return np.random.default_rng(0).integers(-(2**15), 2**15, (UTTERANCES, SAMPLES), np.int16)


@pytest.fixture
def job(waves: np.ndarray, tmp_path: Path) -> PeerJob:
    """A set of three tars with an epoch's windows to measure."""
    shards = [f"shard-{number}.tar" for number in range(3)]
    for number, shard in enumerate(shards):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for row in range(number * UTTERANCES // 3, (number + 1) * UTTERANCES // 3):
                for suffix, data in (("flac", audio.encode(waves[row], "flac")), ("json", b'{"speaker": "s"}')):
                    entry = tarfile.TarInfo(f"u{row:02d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, BytesIO(data))
    (tmp_path / "scratch").mkdir()
    return PeerJob(str(tmp_path), shards, "flac", WINDOW, 8, UTTERANCES, 1, 16, 0, tmp_path / "scratch")


def _sources(windows: np.ndarray, waves: np.ndarray) -> list[tuple[int, int]]:
    """(utterance, first sample) of each window; fails when one is no slice of an utterance."""
    places = {waves[row, at : at + 4].tobytes(): (row, at) for row in range(UTTERANCES) for at in range(SAMPLES)}
    found = [places[window[:4].tobytes()] for window in windows]
    for window, (row, at) in zip(windows, found, strict=True):
        assert np.array_equal(window, waves[row, at : at + WINDOW])
    return found


# The peer of Ray Data starts a Ray, for a minute.
CASES = [pytest.param(name, 1, marks=long if name == "ray.data" else ()) for name in MODULES]
CASES += [(name, 2) for name in MODULES if name != "ray.data"]


@pytest.mark.parametrize(("name", "workers"), CASES)
def test_a_peer_delivers_shuffled_windows_of_real_utterances_and_leaves_nothing_behind(
    name, workers, job, waves, tmp_path
):
    if not find_spec(MODULES[name]):
        pytest.skip(f"{name} is not installed")
    values = {**asdict(job), "workers": workers, "folder": str(job.folder)}
    (tmp_path / "measure.py").write_text(MEASURE)
    command = [sys.executable, str(tmp_path / "measure.py"), name, str(tmp_path / "kept.npy"), json.dumps(values)]
    # A short name: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "TMPDIR": scratch}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert process.returncode == 0, process.stderr
        # PyTorch's compiler makes a folder when it is imported, as some peers do.
        assert [path for path in Path(scratch).iterdir() if not path.name.startswith("torchinductor_")] == []
    # No banners, bars or warnings of the library either.
    assert process.stderr == ""
    told = json.loads(process.stdout)
    assert told.pop("seconds") > 0
    assert told == {"children": [], "threads": [], "litter": []}
    windows = np.load(tmp_path / "kept.npy")
    assert windows.dtype == np.int16 and windows.shape[1] == WINDOW
    places = _sources(windows, waves)
    utterances, starts = [row for row, _ in places], {at for _, at in places}
    assert len(starts) > UTTERANCES // 2
    if workers == 1:
        assert sorted(utterances) == list(range(UTTERANCES)) != utterances
    else:
        # Workers give whole batches, each of their own shards.
        assert len(windows) >= UTTERANCES and len(set(utterances)) > UTTERANCES // 2


def test_a_peer_that_is_not_installed_is_absent(monkeypatch):
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("webdataset", "lhotse", "ray", "litdata", "streaming"):
        monkeypatch.delitem(sys.modules, f"cpcscale.bench.peers.{name}", raising=False)
        monkeypatch.delattr(f"cpcscale.bench.peers.{name}", raising=False)
    assert peers.installed_peers() == {}


def test_a_set_with_utterances_shorter_than_a_window_is_refused_with_a_way_out(job, waves):
    crops = CropDecoder(replace(job, samples=SAMPLES + 1))
    with pytest.raises(UserError, match=r"lower window\.seconds"):
        crops([audio.encode(waves[0], "flac")])


def test_a_peer_that_ends_before_the_last_window_is_no_measurement(job, monkeypatch):
    monkeypatch.setattr(peers, "installed_peers", lambda: {"short": _giving(3)})
    with pytest.raises(RuntimeError, match="only 21 of 24"):
        peers.peer_measurements(replace(job, batch=7))["short"]()


def _giving(batches: int) -> peers.Opener:
    @contextlib.contextmanager
    def opened(job: PeerJob) -> Iterator[Callable[[], list[np.ndarray]]]:
        yield lambda: [np.zeros((job.batch, job.samples), np.int16)] * batches

    return opened
