"""What infra/ holds, read as data: YAML documents, and every command of cpcscale in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
# Where the images have the checkout's configs and jobs.
IN_IMAGE = "/opt/cpcscale/"


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def leaves(tree: Any) -> Iterator[str]:
    """Every text in nested mappings and lists."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from leaves(value)
    elif isinstance(tree, str):
        yield tree


def cpcscale_commands(text: str) -> list[list[str]]:
    """The arguments of each cpcscale command in a text of shell: `cpcscale VERB ...`, or `jobs/VERB.py ...`."""
    found = []
    for line in text.replace("\\\n#", " ").replace("\\\n", " ").splitlines():
        # Comments of a script hold commands too; those after a command do not.
        line = line.strip().lstrip("# ").partition(" #")[0]
        words = shlex.split(line) if _NAMED.search(line) else []
        for place, word in enumerate(words):
            job = re.fullmatch(r"(?:\S*/)?jobs/(\w+)\.py", word)
            if job:
                found.append([job[1], *words[place + 1 :]])
            elif word == "cpcscale" or word.endswith("cpcscale.sbatch"):
                found.append(words[place + 1 :])
            else:
                continue
            break
    return found


_NAMED = re.compile(r"(^|-- )cpcscale [a-z]+ |jobs/\w+\.py|sbatch \S*cpcscale\.sbatch")
