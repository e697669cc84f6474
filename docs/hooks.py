"""What the build of the site adds to the pages of docs/: the reference, and the files of the project that they link to.

A page links to a file of the project by its path (`../CHANGELOG.md`), so that links work where the project is read as
files. In the site such a file has a copy under `project/`, a page if it is Markdown, and the links lead there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reference
from properdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
COPIES = "project"
# [text](target), but no image.
_LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()([^)\s]+)(\))")


def on_config(config: Any) -> Any:
    """The reference takes its place in the navigation, page by page."""
    verbs = [{verb: f"reference/{verb}.md"} for verb in reference.verbs()]
    code = [{room: f"reference/code/{room}.md"} for room in reference.rooms()]
    config.nav.append({"Reference": ["reference/index.md", {"Verbs and keys": verbs}, {"Code": code}]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the reference and the copies; links are followed from copy to copy."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    pending = [f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by]
    copied = set[str]()
    while pending:
        path = pending.pop()
        for target in _project_files(path, (ROOT / path).read_text(encoding="utf-8")):
            if target not in copied:
                copied.add(target)
                pending += [target] if target.endswith(".md") else []
    for path in sorted(copied):
        files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ lead to the copies, and those of a copy back to the pages."""
    here = page.file.src_uri
    place = here.removeprefix(f"{COPIES}/") if here.startswith(f"{COPIES}/") else f"docs/{here}"

    def moved(link: re.Match[str]) -> str:
        target, mark, anchor = link[2].partition("#")
        path = _resolved(place, target)
        if target and (ROOT / path).is_dir():
            # A site has no folders to look into: the words stay.
            return link[1].removeprefix("[").removesuffix("](")
        if not target or "://" in target or not (ROOT / path).is_file():
            return link[0]
        there = path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}"
        return f"{link[1]}{posixpath.relpath(there, posixpath.dirname(here) or '.')}{mark}{anchor}{link[3]}"

    return _LINK.sub(moved, markdown)


def _project_files(place: str, text: str) -> Iterator[str]:
    """The files outside of docs/ that the Markdown at `place` links to."""
    for _, target, _ in _LINK.findall(text):
        path = _resolved(place, target.partition("#")[0])
        if "://" not in target and not path.startswith("docs/") and (ROOT / path).is_file():
            yield path


def _resolved(place: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
