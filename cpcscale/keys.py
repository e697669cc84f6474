"""The config keys of each verb, from its dataclass: names, types, defaults and the comments of the source.

A key's comment is what stands in the source right above the field, behind it, or in a string below it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

_PLAIN = ("str", "int", "float", "bool")


@dataclasses.dataclass(frozen=True)
class Key:
    """One config key: its whole name, type, default, comment (empty: none), and the class that has it."""

    name: str
    kind: str
    default: str
    comment: str
    owner: type


def config_classes(verb: str) -> tuple[type, ...]:
    """What `key=value` of the verb is read into; `bench` has a class for each thing that it measures."""
    match verb:
        case "pack":
            from cpcscale.shards.pack import PackConfig

            return (PackConfig,)
        case "index":
            from cpcscale.shards.adoption.read_tar import IndexConfig

            return (IndexConfig,)
        case "audit":
            from cpcscale.cluster.audit import AuditConfig

            return (AuditConfig,)
        case "pretrain" | "size":
            from cpcscale.cluster.pretrain_config import PretrainConfig

            return (PretrainConfig,)
        case "checkpoint":
            from cpcscale.experiments.acoustics import AcousticsConfig

            return (AcousticsConfig,)
        case "corpus":
            from cpcscale.emotion.corpora.corpus import CorpusConfig

            return (CorpusConfig,)
        case "finetune" | "recogniser":
            from cpcscale.experiments.finetune import FinetuneConfig

            return (FinetuneConfig,)
        case "sweep":
            from cpcscale.experiments.sweep.config import SweepConfig

            return (SweepConfig,)
        case "evaluate":
            from cpcscale.experiments.evaluate.config import EvaluateConfig

            return (EvaluateConfig,)
        case "reproduce":
            from cpcscale.experiments.many_runs_config import ReproduceConfig

            return (ReproduceConfig,)
        case "compare":
            from cpcscale.tracking.store import TrackingConfig

            return (TrackingConfig,)
        case "doctor":
            from cpcscale.doctor import DoctorConfig

            return (DoctorConfig,)
        case "bench":
            from cpcscale.bench.feed import FeedBenchConfig
            from cpcscale.bench.scale import ScaleBenchConfig
            from cpcscale.bench.train import TrainBenchConfig

            return (FeedBenchConfig, TrainBenchConfig, ScaleBenchConfig)
        case _:
            return ()


def lines(verb: str) -> Iterator[str]:
    """The keys of a verb as a person reads them: `key=default`, and its comment below."""
    for root in config_classes(verb):
        if len(config_classes(verb)) > 1:
            yield f"{root.__name__}:"
        for key in keys_of(root):
            kind = key.kind.replace("`", "")
            yield f"{key.name}={key.default}" if key.kind in _PLAIN else f"{key.name}={key.default}   ({kind})"
            yield from textwrap.wrap(key.comment, 110, initial_indent="    ", subsequent_indent="    ")


def keys_of(root: type, prefix: str = "", made: Any = None) -> Iterator[Key]:
    """The keys of a config class, those of its groups among them, in the order of the source.

    `made` is an instance whose values are the defaults, where a class states others for one of its groups.
    """
    hints = typing.get_type_hints(root)
    for field in dataclasses.fields(root):
        default = getattr(made, field.name) if made is not None else _default(field)
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from keys_of(hint, f"{prefix}{field.name}.", None if default is hint else default)
        else:
            owner = next(each for each in root.__mro__ if field.name in inspect.get_annotations(each))
            comment = _comments(owner).get(field.name, "")
            yield Key(f"{prefix}{field.name}", _type(hint), _value(default), comment, root)


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
