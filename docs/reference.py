"""The reference pages as Markdown, made from the code at each build: verbs, config keys, modules. Never committed.

A key's type and default are those of its dataclass. Its comment is what stands in the source right above the field,
behind it, or in a string below it; a key without one says so. Run by itself, this file lists the keys without one.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpcscale.arguments import command_line

PACKAGE = Path(__file__).parents[1] / "cpcscale"
NO_COMMENT = "**(no comment)**"
# What `key=value` of each verb is read into, as module:class; `bench` has one for each thing that it measures.
CONFIGS = {
    "pack": ("cpcscale.shards.pack:PackConfig",),
    "index": ("cpcscale.shards.adoption.read_tar:IndexConfig",),
    "audit": ("cpcscale.cluster.audit:AuditConfig",),
    "pretrain": ("cpcscale.cluster.pretrain_config:PretrainConfig",),
    "size": ("cpcscale.cluster.pretrain_config:PretrainConfig",),
    "corpus": ("cpcscale.emotion.corpora.corpus:CorpusConfig",),
    "finetune": ("cpcscale.experiments.finetune:FinetuneConfig",),
    "sweep": ("cpcscale.experiments.sweep.config:SweepConfig",),
    "evaluate": ("cpcscale.experiments.evaluate.config:EvaluateConfig",),
    "reproduce": ("cpcscale.experiments.many_runs_config:ReproduceConfig",),
    "compare": ("cpcscale.tracking.tracker:TrackingConfig",),
    "bench": (
        "cpcscale.bench.feed:FeedBenchConfig",
        "cpcscale.bench.train:TrainBenchConfig",
        "cpcscale.bench.scale:ScaleBenchConfig",
    ),
    "checkpoint": (),
}
# Verbs whose keys are those of another one.
SAME_KEYS = {"size": "pretrain"}


@dataclasses.dataclass(frozen=True)
class Key:
    """One config key: its whole name, type, default, comment (empty: none), and the class that has it."""

    name: str
    kind: str
    default: str
    comment: str
    owner: type


def config_class(name: str) -> type:
    """The dataclass that `module:class` names; one of CONFIGS, never what a user wrote."""
    module, _, attribute = name.partition(":")
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def keys(root: type, prefix: str = "", made: Any = None) -> Iterator[Key]:
    """The keys of a config class, those of its groups among them, in the order of the source.

    `made` is an instance whose values are the defaults, where a class states others for one of its groups.
    """
    hints = typing.get_type_hints(root)
    for field in dataclasses.fields(root):
        default = getattr(made, field.name) if made is not None else _default(field)
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from keys(hint, f"{prefix}{field.name}.", None if default is hint else default)
        else:
            owner = next(each for each in root.__mro__ if field.name in inspect.get_annotations(each))
            comment = _comments(owner).get(field.name, "")
            yield Key(f"{prefix}{field.name}", _type(hint), _value(default), comment, root)


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
    for name in CONFIGS[verb]:
        root = config_class(name)
        title = "Keys" if len(CONFIGS[verb]) == 1 else f"Keys of {root.__name__}"
        lines += [f"## {title}", "", _said(root), "", *_tables(root)]
    if not CONFIGS[verb]:
        lines += ["## Keys", "", "None.", ""]
    return "\n".join(lines)


def _tables(root: type) -> list[str]:
    """A table for each group of keys, under a heading of its own where it is not the top one."""
    groups: dict[str, list[Key]] = {}
    for key in keys(root):
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


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default, or the class of a group that has no other defaults than its own."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory if isinstance(field.default_factory, type) else field.default_factory()


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    if hint is Any:
        return "any"
    # A container says what is in it, a plain class its name.
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _value(default: Any) -> str:
    if default in (list, dict):
        default = default()
    if isinstance(default, str) and default:
        return default
    if isinstance(default, float):
        return f"{default:.4g}"
    return json.dumps(default)


@functools.cache
def _comments(owner: type) -> dict[str, str]:
    """The comment of each field that the class itself states."""
    source = textwrap.dedent(inspect.getsource(owner))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    lines = source.splitlines()
    body = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)).body
    found = {}
    for number, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        line = node.lineno - 1
        above: list[str] = []
        while lines[line - 1].lstrip().startswith("#"):
            above.insert(0, texts[line])
            line -= 1
        parts = [" ".join(above), texts.get(node.end_lineno or node.lineno, "")]
        after = body[number + 1] if number + 1 < len(body) else None
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            parts.append(inspect.cleandoc(str(after.value.value)))
        found[node.target.id] = "; ".join(" ".join(part.split()) for part in parts if part)
    return found


def _cell(text: str) -> str:
    """Text as a cell of a table: it may hold neither a bar nor what reads as markup."""
    for mark in ("|", "*", "<", "["):
        text = text.replace(mark, f"&#{ord(mark)};")
    return text


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "&#124;")


def undocumented() -> list[str]:
    """The keys without a comment, each once, by the class that has them."""
    roots = {config_class(name) for names in CONFIGS.values() for name in names}
    without = [key for root in roots for key in keys(root) if not key.comment]
    return sorted({f"{key.owner.__module__}.{key.owner.__name__}.{key.name.rpartition('.')[2]}" for key in without})


if __name__ == "__main__":
    for missing in undocumented():
        print(missing)  # noqa: T201
