"""The reference pages as Markdown, made from the code at each build: verbs, config keys, modules. Never committed.

A key without a comment says so. Run by itself, this file lists the keys without one.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from cpcscale.arguments import command_line
from cpcscale.keys import Key, config_classes, keys_of

PACKAGE = Path(__file__).parents[1] / "cpcscale"
NO_COMMENT = "**(no comment)**"
# Verbs whose keys are those of another one.
SAME_KEYS = {"size": "pretrain"}


def verbs() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """What each verb is for, and its parser."""
    action = next(each for each in command_line()._actions if isinstance(each, argparse._SubParsersAction))
    help_of = {each.dest: each.help or "" for each in action._choices_actions}
    return {verb: (help_of[verb], parser) for verb, parser in action.choices.items()}


def pages() -> dict[str, str]:
    """Every reference page: its path below docs/, and its Markdown."""
    found = {"reference/index.md": _index_page()}
    found |= {f"reference/{verb}.md": _verb_page(verb, text, parser) for verb, (text, parser) in verbs().items()}
    for room in rooms():
        found[f"reference/code/{room}.md"] = _room_page(room)
    return found


def rooms() -> dict[str, list[str]]:
    """The modules of each room: a folder or a single file of the package."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] == "__main__" or parts == ("__init__",):
            continue
        module = ".".join(("cpcscale", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        found.setdefault(parts[0], []).append(module)
    return found


def _index_page() -> str:
    rows = [f"| [`{verb}`]({verb}.md) | {_cell(text)} |" for verb, (text, _) in verbs().items()]
    modules = [f"- [{room}](code/{room}.md)" for room in rooms()]
    lines = ["# Reference", "", "Made from the code at each build of this site.", "", "## Verbs", ""]
    lines += ["| verb | what it does |", "|---|---|", *rows, "", "## Code", "", *modules, ""]
    return "\n".join(lines)


def _verb_page(verb: str, text: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"# cpcscale {verb}", "", text, "", "```text", parser.format_help().rstrip(), "```", ""]
    if verb in SAME_KEYS:
        same = SAME_KEYS[verb]
        return "\n".join([*lines, "## Keys", "", f"Those of [`{same}`]({same}.md#keys).", ""])
    for root in config_classes(verb):
        title = "Keys" if len(config_classes(verb)) == 1 else f"Keys of {root.__name__}"
        lines += [f"## {title}", "", _said(root), "", *_tables(root)]
    if not config_classes(verb):
        lines += ["## Keys", "", "None.", ""]
    return "\n".join(lines)


def _tables(root: type) -> list[str]:
    """A table for each group of keys, under a heading of its own where it is not the top one."""
    groups: dict[str, list[Key]] = {}
    for key in keys_of(root):
        groups.setdefault(key.name.rpartition(".")[0], []).append(key)
    lines: list[str] = []
    for group in sorted(groups, key=lambda name: name != ""):
        if group:
            lines += [f"### {root.__name__}: {group}", "", _said(groups[group][0].owner), ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {_cell(key.kind)} | {_code(key.default)} | {_cell(key.comment) or NO_COMMENT} |"
            for key in groups[group]
        ]
        lines.append("")
    return lines


def _room_page(room: str) -> str:
    lines = [f"# {room}", ""]
    for module in rooms()[room]:
        lines += [f"::: {module}", "    options:", "      heading_level: 2", ""]
    return "\n".join(lines)


def _said(root: type) -> str:
    return inspect.cleandoc(root.__doc__ or "")


def _cell(text: str) -> str:
    """Text as a cell of a table: it may hold neither a bar nor what reads as markup."""
    for mark in ("|", "*", "<", "["):
        text = text.replace(mark, f"&#{ord(mark)};")
    return text


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "&#124;")


def undocumented() -> list[str]:
    """The keys without a comment, each once, by the class that has them."""
    roots = {root for verb in verbs() for root in config_classes(verb)}
    without = [key for root in roots for key in keys_of(root) if not key.comment]
    return sorted({f"{key.owner.__module__}.{key.owner.__name__}.{key.name.rpartition('.')[2]}" for key in without})


if __name__ == "__main__":
    for missing in undocumented():
        print(missing)  # noqa: T201
