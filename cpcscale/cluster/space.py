"""The search space of a sweep as YAML has it: a config key to one way of drawing its value.

    fit.learning_rate: {loguniform: [1e-4, 1e-2]}
    fit.batch: {choice: [8, 16, 32]}

Only keys that leave data, folds and features as they are can be searched, so that trials compare like with like and
share one set of features. Bounds: uniform, loguniform and quniform include both ends, randint leaves out the upper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpcscale import config as configs
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError, nearest

FORMS = ("uniform", "loguniform", "quniform", "randint", "choice")
_SEARCHED = ("fit.", "recogniser.", "encoder.learning_rate")
# The epoch is chosen on development speakers in every trial already, and a device is no setting.
_LEFT_OUT = ("fit.epochs", "fit.device")


@dataclass(frozen=True)
class Dimension:
    """One searched key: its `form` and that form's arguments (for choice, the values)."""

    key: str
    form: str
    arguments: tuple[Any, ...]


def parse(space: Mapping[str, Any], recipe: EmotionRecipe) -> list[Dimension]:
    """The dimensions of a space. Raises UserError for an unknown key or form, and values that do not fit the key."""
    known = {key: value for key, value in configs.flat(recipe).items() if _searchable(key)}
    found = [_dimension(key, entry, known) for key, entry in _entries(space)]
    if not found:
        raise UserError("space is empty: name at least one key, such as fit.learning_rate: {loguniform: [1e-4, 1e-2]}")
    return found


def apply(recipe: EmotionRecipe, values: Mapping[str, Any]) -> EmotionRecipe:
    """The recipe with these keys changed. Raises UserError for what the config itself refuses."""
    fields = {field.name for field in dataclasses.fields(EmotionRecipe)}
    tree = {name: value for name, value in dataclasses.asdict(recipe).items() if name in fields}
    for key, value in values.items():
        *groups, last = key.split(".")
        branch = tree
        for group in groups:
            branch = branch[group]
        branch[last] = value
    return configs.build(EmotionRecipe, tree)


def _searchable(key: str) -> bool:
    return key.startswith(_SEARCHED) and key not in _LEFT_OUT


def _entries(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys may be dotted or nested, as in any config."""
    for key, entry in space.items():
        if isinstance(entry, Mapping) and not any(form in FORMS for form in entry) and _is_group(entry):
            yield from _entries(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def _is_group(entry: Mapping[str, Any]) -> bool:
    return bool(entry) and all(isinstance(value, Mapping) for value in entry.values())


def _dimension(key: str, entry: Any, known: Mapping[str, Any]) -> Dimension:
    if key not in known:
        raise UserError(f"space: {key} cannot be searched{nearest(key, list(known))}; these can: {', '.join(known)}")
    if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in FORMS:
        raise UserError(f"space: {key}: {entry!r} is not one of the forms {', '.join(FORMS)}, as {{choice: [1, 2]}}")
    form, given = next(iter(entry.items()))
    if not isinstance(given, list | tuple) or not given:
        raise UserError(f"space: {key}: {form} wants a list of values, not {given!r}")
    arguments = tuple(given)
    if form != "choice":
        _check_range(key, form, arguments)
    _check_type(key, form, arguments, known[key])
    return Dimension(key, form, arguments)


def _check_range(key: str, form: str, arguments: tuple[Any, ...]) -> None:
    count = 3 if form == "quniform" else 2
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in arguments)
    if len(arguments) != count or not numbers or not arguments[0] < arguments[1]:
        wanted = "[low, high, step]" if count == 3 else "[low, high]"
        raise UserError(f"space: {key}: {form} wants {wanted} with low below high, not {list(arguments)}")
    if form == "loguniform" and arguments[0] <= 0:
        raise UserError(f"space: {key}: loguniform wants a low above 0, not {arguments[0]}")


def _check_type(key: str, form: str, arguments: tuple[Any, ...], current: Any) -> None:
    whole = isinstance(current, int) and not isinstance(current, bool)
    if whole and form not in ("randint", "choice"):
        raise UserError(f"space: {key} is a whole number: draw it by randint or choice, not {form}")
    kinds = (int, float) if isinstance(current, float) else (type(current),)
    for value in arguments:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"space: {key}: {value!r} is not of the type of {current!r}, its value now")
