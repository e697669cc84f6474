"""Typed configs: a tree of dataclasses, filled from one YAML file and `key=value` overrides.

Each component keeps its dataclass beside its code; the config of a run is composed of them. Loading is strict: an
unknown key is an error that names the nearest known one, and every dataclass checks its values when it is built.

`identity` holds the keys that decide what a run computes, `digest` is their hash. By them a finished run is found again
and a checkpoint is resumed. So that releases can add and remove keys:

- a field with `metadata=PLACE` says where or how fast a run happens and is never part of the identity;
- a field with `metadata=ADDED` was added after release 0.1 and is part of it only when it is not at its default;
- a class lists the keys that were removed in `REMOVED`, with their old defaults: the identity still holds these. A file
  or a checkpoint may hold such a key at its old default, which is ignored; any other value is refused.

A key that holds text takes it as typed, whatever YAML would read there: `run_dir=20261129_222632`, `name: 007`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cpcscale.errors import UserError, nearest

T = TypeVar("T")

# Metadata of dataclass fields: see the docstring of this module.
PLACE = {"identity": False}
ADDED = {"added": True}
_SECRET = re.compile(r"secret|password|token|access_key", re.IGNORECASE)
# Up to the last @ before the path, for a password may hold an @. A query may hold secrets too.
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+(?=@)")
_URL_SECRETS = re.compile(
    r"(?<=[?&])([^=&\s]*(?:secret|password|token|access_key|signature|credential)[^=&\s]*=)[^&\s]+", re.I
)
_MISSING = "???"


# What readers of YAML raise for a text that is none: also for `!!int` without a number, or for too many brackets.
_NOT_YAML = (
    *(yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, AttributeError, TypeError, RecursionError),
)


class _TextLoader(yaml.SafeLoader):
    """Reads YAML with every scalar as the text that stands there."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # noqa: RUF012


def load(root: type[T], path: str | None, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `root`: its defaults, then the YAML file at `path`, then `key=value` overrides.

    Raises UserError for a missing or malformed file, an unknown key, a value of the wrong type, and for values that
    the dataclasses refuse.

    >>> from cpcscale.stream.window import WindowConfig
    >>> load(WindowConfig, None, ["seconds=2.5"])
    WindowConfig(kind='tile', seconds=2.5)
    >>> load(WindowConfig, None, ["second=2.5"])
    Traceback (most recent call last):
    cpcscale.errors.UserError: override 'second=2.5': unknown key second (did you mean seconds?)
    """
    tree = copy.deepcopy(_schema(cast(Any, root)))
    # Taken from the classes alone: keys that a file puts into a free mapping must not become part of the schema.
    schema = OmegaConf.to_container(tree)
    known = [key for key, _ in leaves(schema)] + list(_branches(schema))
    layers = [] if path is None else [(path, _read(root, path))]
    layers += [(f"override {text!r}", _override(root, text)) for text in overrides]
    for source, layer in layers:
        layer = _without_removed(root, layer, source)
        _check_layer(source, layer, schema, known)
        try:
            tree.merge_with(OmegaConf.create(layer))
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {_first_line(error)} (key {error.full_key})") from None
    try:
        return cast(T, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        # OmegaConf wraps the error of a dataclass in its own; the first line is still the message for the user.
        raise UserError(f"{path or root.__name__}: {_first_line(error)} (key {error.full_key})") from None


def load_any(roots: Sequence[type], path: str, overrides: Sequence[str] = ()) -> Any:
    """`load` of the one of `roots` that has the most of the file's keys; the first of several."""
    keys = _read(roots[0], path).keys()
    names = {root: {field.name for field in dataclasses.fields(root)} for root in roots}
    return load(max(roots, key=lambda root: len(keys & names[root])), path, overrides)


def read_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError or UnicodeDecodeError for what is none."""
    try:
        return json.loads(data)
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None


def build(root: type[T], values: dict[str, Any]) -> T:
    """An instance of the dataclass `root` from plain values, such as those of a checkpoint; as strict as `load`."""
    kept = _without_removed(root, values, root.__name__)
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(_schema(cast(Any, root)), OmegaConf.create(kept))))
    except OmegaConfBaseException as error:
        raise UserError(f"{root.__name__} cannot be made from what is stored: {_first_line(error)}") from None


def to_dict(config: object) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, secrets replaced by `***`."""
    return {key: redacted(key, value) for key, value in dataclasses.asdict(cast(Any, config)).items()}


def flat(config: object) -> dict[str, Any]:
    """The config as `a.b.c: value`, secrets replaced by `***`: what a tracker logs as parameters."""
    return dict(leaves(to_dict(config)))


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`a.b.c`, value) of all that is no mapping in nested ones, or an empty one."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def identity(config: object) -> dict[str, Any]:
    """The keys of the config that can change a result, as plain values; the same in all releases."""
    found = copy.deepcopy(dict(getattr(config, "REMOVED", {})))
    for field in dataclasses.fields(cast(Any, config)):
        value = _plain(getattr(config, field.name))
        added = field.metadata.get("added", False)
        if field.metadata.get("identity", True) and not (added and value == _plain(_default(field))):
            found[field.name] = value
    return found


def digest(config: object) -> str:
    """sha256 in hex of the JSON of `identity`, with sorted keys. Folders, workers and trackers are not part of it."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ, each as a text `key=old, this config says new`."""
    before, after = dict(leaves(old)), dict(leaves(new))
    texts = []
    for key in before | after:
        if key not in after:
            texts.append(f"{key}={before[key]}, a key that this version of cpcscale does not have")
        elif key not in before:
            texts.append(f"no {key}, this config says {after[key]}")
        elif before[key] != after[key]:
            texts.append(f"{key}={before[key]}, this config says {after[key]}")
    return texts


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises UserError when `value`, which the user knows as `name`, is not one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{name}={value!r} is not one of {', '.join(allowed)}{nearest(value, list(allowed))}")


def at_least(least: float, **values: float) -> None:
    """Raises UserError when one of the named values is below `least` or not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name}={value} is not a finite number: give {least} or more")
        if value < least:
            raise UserError(f"{name}={value} is below {least}, the least that makes sense")


@functools.cache
def _schema(root: Any) -> Any:
    """The tree of `root` with the defaults that its classes state; to be copied, as it is made once.

    Not those of an instance: a part may derive values when it is built, and these would stay when a file then sets the
    key that they were derived from.
    """
    tree = OmegaConf.structured(root)
    for field in dataclasses.fields(root):
        if dataclasses.is_dataclass(field.default_factory):
            tree[field.name] = _schema(field.default_factory)
    return tree


def _read(root: Any, path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"no config file {path}: name a YAML file, for example one under configs/")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        texts = _TextLoader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except (*_NOT_YAML, OSError) as error:
        raise UserError(f"{path} is not YAML that can be read: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a list, not a mapping of keys to values")
    return cast(dict[str, Any], _as_typed(root, content, texts))


def _override(root: Any, text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(map(str.strip, key.split("."))):
        raise UserError(f"cannot read {text!r}: overrides are written key=value")
    kind, names = root, key.strip().split(".")
    for name in names:
        kind = _kind_below(kind, name)
    if _holds_text(kind) and not _is_null(kind, value):
        return _nested(names, _unquoted(value.strip()))
    try:
        # `key=` means the empty text, but YAML would read null.
        dotlist = [f"value={value}" if value.strip() else 'value=""']
        read = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist(dotlist)))
        texts = _nested(names, _TextLoader(value).get_single_data())
        return cast(dict[str, Any], _as_typed(root, _nested(names, read["value"]), texts))
    except _NOT_YAML:
        raise UserError(f"cannot read the value of {text!r} as YAML: quote it") from None


def _nested(names: Sequence[str], value: Any) -> Any:
    for name in reversed(names):
        value = {name: value}
    return value


def _unquoted(text: str) -> str:
    """`text` without the quotes of a YAML text, if it is wholly in quotes."""
    if text[:1] in ("'", '"'):
        with contextlib.suppress(*_NOT_YAML):
            inner = yaml.safe_load(text)
            return inner if isinstance(inner, str) else text
    return text


def _kind_below(kind: Any, name: str) -> Any:
    """The type of what stands under `name` in a value of the type `kind`; None where any is taken."""
    if dataclasses.is_dataclass(kind):
        return get_type_hints(kind).get(name)
    return get_args(kind)[1] if get_origin(kind) is dict else None


def _holds_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return kind is str or set(get_args(kind)) == {str, type(None)}


def _is_null(kind: Any, text: str) -> bool:
    """Whether `text` is YAML's null, for a key of the type `kind` that may be None."""
    return type(None) in get_args(kind) and text.strip().lower() in ("null", "~")


def _as_typed(kind: Any, value: Any, text: Any) -> Any:
    """`value`, as YAML reads it, with the text itself where the type `kind` has text. `text` is the same tree."""
    if isinstance(value, dict) and isinstance(text, dict):
        return {key: _as_typed(_kind_below(kind, key), item, text.get(str(key))) for key, item in value.items()}
    if isinstance(value, list) and isinstance(text, list) and get_origin(kind) is list:
        return [_as_typed(get_args(kind)[0], *pair) for pair in zip(value, text, strict=True)]
    return text if _holds_text(kind) and isinstance(text, str) and not _is_null(kind, text) else value


def _check_layer(source: str, layer: Any, schema: Any, known: list[str], prefix: str = "") -> None:
    """Raises UserError for unknown keys in `layer`, and for values that OmegaConf would accept or crash on.

    A free mapping in the schema (an empty dict) takes any key.
    """
    if not isinstance(layer, dict) or not isinstance(schema, dict) or not schema:
        return
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if name in known and key not in schema:
            raise UserError(
                f"{source}: {name} is written as one key: in a file, nest it, as `train:` and below it `steps: 60`"
            )
        if key not in schema:
            raise UserError(f"{source}: unknown key {name}{nearest(name, known) or _siblings(schema, prefix)}")
        plain = value if isinstance(value, list) else [value]
        if any(isinstance(each, int) and abs(each) >= 1 << 63 for each in plain):
            raise UserError(f"{source}: {name} is a number of more than 64 bits")
        if value == _MISSING:
            raise UserError(f"{source}: {name} has no value yet ({_MISSING}): give it one")
        if isinstance(schema[key], dict) and not isinstance(value, dict):
            raise UserError(
                f"{source}: {name} is a group of keys ({', '.join(schema[key]) or 'any'}), not the value {value!r}"
            )
        if isinstance(schema[key], list) and not _is_plain_list(value):
            raise UserError(f"{source}: {name} is a list of plain values, such as [a, b], not {value!r}")
        _check_layer(source, value, schema[key], known, f"{name}.")


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _siblings(schema: dict[str, Any], prefix: str) -> str:
    return f"; {prefix[:-1] or 'the top level'} has: {', '.join(schema)}"


def _branches(tree: Any, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{prefix}{key}"
            yield from _branches(value, f"{prefix}{key}.")


def _plain(value: Any) -> Any:
    """The value of a field as plain values; that of a dataclass is its identity."""
    return identity(value) if dataclasses.is_dataclass(value) else value


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _without_removed(root: Any, values: Any, source: str, prefix: str = "") -> Any:
    """`values` without the removed keys of `root` and its parts. Raises UserError for one not at its old default."""
    if not isinstance(values, dict):
        return values
    removed, kept = getattr(root, "REMOVED", {}), {}
    parts = {field.name: field.default_factory for field in dataclasses.fields(root) if callable(field.default_factory)}
    for key, value in values.items():
        if key not in removed:
            part = parts[key]() if key in parts else None
            kept[key] = (
                _without_removed(type(part), value, source, f"{prefix}{key}.")
                if dataclasses.is_dataclass(part)
                else value
            )
        elif value != removed[key]:
            raise UserError(
                f"{source}: {prefix}{key}={value} was removed; only its old default {removed[key]} is still accepted: "
                "leave it out, or use the release of cpcscale that the file is from"
            )
    return kept


def redacted(key: str, value: Any) -> Any:
    """`value` as it may be shown under the name `key`: `***` for a secret; URLs are redacted, nested values too."""
    if value and _SECRET.search(str(key)):
        return "***"
    if isinstance(value, dict):
        return {inner: redacted(inner, item) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(key, item) for item in value]
    return redact(value) if isinstance(value, str) else value


def redact(text: str) -> str:
    """`text` with the user, password and signed query of any URL in it replaced by `***`."""
    return _URL_SECRETS.sub(r"\1***", _URL_CREDENTIALS.sub("***", text))


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
