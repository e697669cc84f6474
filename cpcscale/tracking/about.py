"""What MLflow's own pages show of a run: its title, its data, a note of three lines, and where its code is from."""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cpcscale import storage
from cpcscale.config import redact

NOTE_TAG = "mlflow.note.content"
# The most characters of a digest that MLflow takes.
DIGEST_CHARACTERS = 36


@dataclass(frozen=True)
class DataInput:
    """Data that a run reads: its name, digest and place, and what it is `used_for`: training, or pretraining."""

    name: str
    digest: str
    place: str
    used_for: str
    # Counts, such as of utterances and speakers.
    profile: Mapping[str, float]

    def as_input(self) -> Any:
        """It as MLflow's DatasetInput."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind = "s3" if self.place.startswith("s3://") else "local"
        source, profile = json.dumps({"uri": redact(self.place)}), json.dumps(dict(self.profile))
        dataset = Dataset(self.name, self.digest[:DIGEST_CHARACTERS], kind, source, profile=profile)
        return DatasetInput(dataset, [InputTag("mlflow.data.context", self.used_for)])


@dataclass(frozen=True)
class About:
    """What people are told of a run. `title` tells it from its neighbours, `what` is a line on what it is."""

    title: str = ""
    what: str = ""
    data: tuple[DataInput, ...] = ()

    def shown_title(self, name: str, run_dir: str | None) -> str:
        """The title, with the last part of the run folder where it does not say it."""
        title, folder = self.title or name, (run_dir or "").rstrip("/").rpartition("/")[2]
        return title if folder in title else f"{title} ({folder})"

    def note(self, run_dir: str | None) -> tuple[str, ...]:
        """The first lines of the note: what it is, and where."""
        if not self.what:
            return ()
        where = storage.absolute(run_dir) if run_dir else "no folder"
        return redact(self.what), redact(where if where.startswith("s3://") else f"{where} on {socket.gethostname()}")


def source_tags() -> dict[str, str]:
    """Tags for making a run again: program, git commit and whether it is changed (in a checkout), versions, platform.

    The commit and the program have MLflow's names, the commit cpcscale's too.
    """
    tags = {"cpcscale.python": platform.python_version(), "cpcscale.platform": platform.platform()}
    program = Path(sys.argv[0])
    tags["mlflow.source.name"] = program.parent.name if program.stem == "__main__" else program.name
    tags["mlflow.source.type"] = "LOCAL"
    for package in ("cpcscale", "torch", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            tags["cpcscale.version" if package == "cpcscale" else f"cpcscale.{package}"] = version(package)
    for folder in (Path(__file__).parent, Path.cwd()):
        if (commit := _git(folder, "rev-parse", "HEAD")) is not None:
            dirty = str(_git(folder, "status", "--porcelain") != "").lower()
            tags |= {"cpcscale.git_commit": commit, "cpcscale.git_dirty": dirty}
            return tags | {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": dirty}
    return tags


def _git(folder: Path, *arguments: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
