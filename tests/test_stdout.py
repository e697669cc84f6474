"""Promises of the command line's output: no traceback where it ends early, is full, or lacks letters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trees import noise, write_tree

ROOT = Path(__file__).parents[1]


def run(arguments: list[str], folder: Path, stdout: int, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "cpcscale", *arguments]
    plain = {"PYTHONPATH": str(ROOT), **os.environ}
    return subprocess.run(
        command, cwd=folder, env=plain | environment, stdout=stdout, stderr=subprocess.PIPE, timeout=120, check=False
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(tmp_path, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    ran = run(["pretrain", "--keys"], tmp_path, writer, PYTHONUNBUFFERED=unbuffered)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_output_that_finds_no_room_is_one_line(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    ran = run(["--help"], tmp_path, full)
    os.close(full)
    assert ran.returncode == 2
    assert ran.stderr.decode().splitlines() == [
        "cpcscale: error: the output cannot be written: No space left on device"
    ]


def test_letters_that_the_terminal_lacks_are_escaped_and_names_are_utf_8_or_refused(tmp_path):
    header = "path,speaker,activation,valence,dominance"
    write_tree(tmp_path, {f"k\u00e4se{n}.wav": noise(1.0, n) for n in range(2)})
    (tmp_path / "t.csv").write_text(f"{header}\nk\u00e4se0.wav,J\u00f6,1,2,3\nk\u00e4se1.wav,b,2,2,3\n", "utf-8")
    describe = ["corpus", "describe", "t.csv"]
    ran = run(describe, tmp_path, subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0 and b"J\\xf6 (1)" in ran.stdout, ran.stderr
    ran = run(describe, tmp_path, subprocess.PIPE, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert ran.returncode == 2 and b"reads names of files as ascii" in ran.stderr and b"PYTHONUTF8=1" in ran.stderr


def test_a_config_may_lie_in_a_folder_with_an_equals_sign(tmp_path):
    (tmp_path / "year=2019").mkdir()
    (tmp_path / "year=2019" / "a.yaml").write_text("nonsense: 1\n")
    ran = run(["reproduce", "year=2019/a.yaml"], tmp_path, subprocess.PIPE)
    assert ran.returncode == 2 and b"year=2019/a.yaml: unknown key nonsense" in ran.stderr
    ran = run(["reproduce", "nonsense=1"], tmp_path, subprocess.PIPE)
    assert b"override 'nonsense=1': unknown key nonsense" in ran.stderr
