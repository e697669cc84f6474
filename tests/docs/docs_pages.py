"""The pages of the documentation, README among them: the commands and the links that they hold."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("cpcscale", "make", "ray", "python")
_FENCE = re.compile(r"```(\w*)")
_BLOCK = re.compile(r"^```(\w+[^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The line before a block that says what its commands want and the project does not carry.
_MARK = re.compile(r"\*\*(Needs [^*:]+):\*\*")
_SETTING = re.compile(r"[A-Za-z_]\w*=.*")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Line:
    """One line of a code block, its continuations joined: where it stands, the block's language and mark."""

    page: Path
    number: int
    language: str
    mark: str
    text: str

    @property
    def words(self) -> list[str]:
        """The command without its comment, and without what is set for it before it."""
        words = shlex.split(self.text, comments=True)
        while words and _SETTING.fullmatch(words[0]):
            words.pop(0)
        return words

    @property
    def is_command(self) -> bool:
        return any(re.match(rf"(\w+=\S* )*{program} ", f"{self.text} ") for program in PROGRAMS)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.number}"


def lines(page: Path, text: str | None = None) -> list[Line]:
    """What stands in the page's code blocks, fenced or indented by four spaces or more."""
    found: list[Line] = []
    fence, language, mark, open_text, began = False, "", "", "", 0
    for number, raw in enumerate((text or page.read_text(encoding="utf-8")).splitlines(), 1):
        stripped = raw.strip()
        if opening := _FENCE.match(stripped):
            fence, language = not fence, opening[1]
            continue
        if not fence and not raw.startswith("    "):
            if stripped:
                marked = _MARK.fullmatch(stripped)
                mark, language = marked[1] if marked else "", ""
            continue
        if not stripped:
            continue
        began = began or number
        open_text += stripped.removesuffix("\\")
        if not stripped.endswith("\\"):
            found.append(Line(page, began, language, mark, open_text))
            open_text, began = "", 0
    return found


def commands() -> list[Line]:
    """Every command of every page, in order."""
    return [line for page in PAGES for line in lines(page) if line.is_command]


def to_run() -> list[Line]:
    """The commands that want nothing which the project does not carry: the tutorial's, then those of other pages."""
    free = [line for line in commands() if line.page != README and not line.mark]
    return sorted(free, key=lambda line: line.page != TUTORIAL)


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(what stands behind the opening fence, the text) of each fenced block of the page that names a language."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """The targets of the page's links that are not code."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    return _LINK.findall(re.sub(r"`[^`\n]*`", "code", prose))


def anchors(page: Path) -> set[str]:
    """The names by which the page's headings are linked to."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def imported(name: str, path: Path) -> ModuleType:
    """The file as a module; it lies outside of every package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def reference() -> ModuleType:
    """docs/reference.py."""
    return imported("docs_reference", ROOT / "docs" / "reference.py")


@cache
def reference_pages() -> dict[str, str]:
    """Every page that docs/reference.py makes, by its path below docs/."""
    return reference().pages()
