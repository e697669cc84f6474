"""The notebooks, and the code of the page on Python, run on the speech that the project carries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from docs_pages import PAGES, ROOT, code_blocks
from made_voices import put_checkpoint

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code(notebook: Path) -> str:
    """The code of all cells, one after the other."""
    return "\n\n".join("".join(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code")


def run(text: str, project: Path, folder: Path) -> None:
    """Runs this code as a script in `folder` of a project with the same tests and configs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tests", "configs"):
        (project / name).symlink_to(ROOT / name)
    (folder / "cells.py").write_text(text, encoding="utf-8")
    env = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(project / "cache")}
    command = [sys.executable, "cells.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_its_folder_and_writes_below_it(notebook: Path, tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "notebooks"
    run(code(notebook), tmp_path, folder)
    assert {path.name for path in folder.iterdir()} <= {"cells.py", "runs"}


def test_the_code_of_the_page_on_python_runs(tmp_path: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "quickstart" / "pretrain")
    blocks = [text for info, text in code_blocks(ROOT / "docs" / "howto" / "python.md") if info.startswith("python")]
    run("\n".join(blocks), tmp_path, tmp_path)
    assert (tmp_path / "runs" / "python" / "recogniser" / "README.md").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_a_page_links_it(notebook: Path) -> None:
    held = json.loads(notebook.read_text(encoding="utf-8"))
    assert (held["nbformat"], held["nbformat_minor"]) == (4, 5)
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(notebook) if "outputs" in cell
    )
    assert any(f"notebooks/{notebook.name}" in page.read_text(encoding="utf-8") for page in PAGES)


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["encoder", "predictions", "recogniser"]
