"""The program of docs/howto/webdataset.md trains on a set that the packer wrote, as it stands in the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from math import log
from pathlib import Path

from docs_pages import ROOT, code_blocks

PAGE = ROOT / "docs" / "howto" / "webdataset.md"
FRAMES, STEPS_AHEAD = 64, 12


def test_the_pages_program_trains_on_a_packed_set_from_webdataset_alone(shards: Path, tmp_path: Path) -> None:
    (program,) = [text for language, text in code_blocks(PAGE) if language.startswith("python")]
    (tmp_path / "plain.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "plain.py", str(shards / "train")]
    # One thread: two that wait for each other on a busy machine take many times longer.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^update \d+: loss (.*)$", done.stdout, flags=re.MULTILINE)]
    assert len(losses) == 30
    chance = sum(log(FRAMES - k) for k in range(1, STEPS_AHEAD + 1)) / STEPS_AHEAD
    assert losses[0] > chance > max(losses[-5:])
