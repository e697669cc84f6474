"""Verbs that only show something answer fast: each loads what it shows from, and never torch or Ray for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What takes longest to load, of all that cpcscale rests on.
HEAVY = {"torch", "ray", "mlflow", "sqlalchemy", "sklearn", "scipy", "pandas", "pyarrow", "matplotlib", "transformers"}
HEAVY |= {"onnxruntime", "soundfile", "fsspec", "s3fs", "aiobotocore", "optuna", "omegaconf", "numpy", "webdataset"}
LOADED = """
import contextlib, io, json, sys
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    {run}
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def loaded(run: str, folder: Path) -> set[str]:
    """The heavy modules that a fresh process has after `run`."""
    text = LOADED.format(run=run, heavy=sorted(HEAVY))
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def verb(*words: str) -> str:
    return f"from cpcscale.cli import main; assert not main({list(words)!r})"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tracked run, in the sqlite file that a first run makes."""
    folder = tmp_path_factory.mktemp("tracked")
    program = (
        "from cpcscale.tracking.store import TrackingConfig\n"
        "from cpcscale.tracking.tracker import Tracker\n"
        "run = Tracker.start(TrackingConfig(), kind='finetune', name='x', run_dir='runs/x', tags={}, params={})\n"
        "run.finish('FINISHED', {'ccc_mean': 0.5})\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("words", [("--help",), ("index", "--help"), ("pretrain", "--help"), ("finetune", "--help")])
def test_help_loads_nothing_heavy(words, tmp_path):
    assert loaded(verb(*words), tmp_path) == set()


def test_a_corpus_is_described_without_torch_or_ray(tmp_path):
    found = loaded(verb("corpus", "describe", str(ROOT / "tests" / "data" / "made_emotion")), tmp_path)
    assert found <= {"numpy", "scipy", "omegaconf", "fsspec", "soundfile"}


def test_runs_are_compared_without_torch_or_ray(tracked):
    assert loaded(verb("compare"), tracked) <= HEAVY - {"torch", "ray", "matplotlib", "sklearn", "transformers"}


def test_checkpoints_are_listed_from_their_files_alone(tmp_path):
    run = str(ROOT / "tests" / "data" / "release_0_1" / "run")
    for words in (("checkpoint", "ls", run), ("checkpoint", "verify", run)):
        assert loaded(verb(*words), tmp_path) <= {"omegaconf", "fsspec"}


@pytest.mark.parametrize(
    ("module", "needs"),
    [
        ("cpcscale", set()),
        ("cpcscale.released", set()),
        ("cpcscale.emotion.scores.ccc", {"numpy"}),
        ("cpcscale.handmade.statistics", {"numpy"}),
        ("cpcscale.handmade.functionals", {"numpy", "soundfile"}),
        ("cpcscale.config", {"omegaconf"}),
    ],
)
def test_a_light_module_loads_no_more_than_it_needs(module, needs, tmp_path):
    assert loaded(f"import {module}", tmp_path) == needs
