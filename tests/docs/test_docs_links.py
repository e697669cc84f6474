"""Links of README and docs/ lead somewhere: to a file, to a heading in it, or to a page that the build makes."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import pytest
from docs_pages import PAGES, README, ROOT, anchors, links, reference_pages


def broken(page: Path, target: str) -> str:
    """What is wrong with a link of the page, or nothing. Other sites are not asked."""
    path, _, anchor = target.partition("#")
    if "://" in target:
        return ""
    here = page.relative_to(ROOT).as_posix()
    place = posixpath.normpath(posixpath.join(posixpath.dirname(here), path)) if path else here
    file = ROOT / place
    if place.removeprefix("docs/") in reference_pages():
        return ""
    if not file.exists():
        return f"{target}: there is no {place}"
    if anchor and anchor not in anchors(file):
        return f"{target}: {file.name} has no heading #{anchor}, but {sorted(anchors(file))}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_internal_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert [wrong for target in links(page) if (wrong := broken(page, target))] == []


def test_broken_links_are_found() -> None:
    assert broken(README, "docs/gone.md") and broken(README, "docs/tutorial.md#gone") and broken(README, "#gone")
    assert not broken(README, "docs/tutorial.md#1-pack") and not broken(README, "docs/reference/pretrain.md")


def test_every_page_can_be_reached_from_the_first() -> None:
    seen, pending = set(), [ROOT / "docs" / "index.md"]
    while pending:
        page = pending.pop()
        if page not in seen:
            seen.add(page)
            near = [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
            pending += [path for path in near if path in PAGES]
    assert set(PAGES) - {README} <= seen


def test_no_page_of_docs_sends_the_reader_back_to_the_readme() -> None:
    led = {(page, (page.parent / target.partition("#")[0]).resolve()) for page in PAGES for target in links(page)}
    assert [page.name for page, there in led if page != README and there == README] == []


def test_the_readme_can_be_read_in_ten_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_module_that_a_page_names_by_its_path_is_there() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    # Those that docs/extending.md makes.
    made = {"cpcscale/emotion/corpora/studio.py", "cpcscale/emotion/systems/energy.py"}
    made |= {"cpcscale/objective/distance.py"}
    named = set(re.findall(r"cpcscale/[\w/]+\.py", text)) - made
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []
