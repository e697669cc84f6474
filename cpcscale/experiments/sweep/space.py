"""The search space of a sweep: how the value of each searched config key is drawn.

    fit.learning_rate: {loguniform: [1e-4, 1e-2]}
    encoder.checkpoint: {choice: [runs/pretrain/a, runs/pretrain/b]}

Every key of the recipe can be searched, except those that make trials incomparable: data, folds and seed. A key that
changes the features has to be a choice, because features are computed once for each of its values. uniform, loguniform
and quniform include both bounds, randint excludes the upper one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpcscale import config as configs
from cpcscale.emotion.recipe import EmotionRecipe, system_of
from cpcscale.errors import UserError, nearest
from cpcscale.experiments.encoders import absolute_checkpoint

FORMS = ("uniform", "loguniform", "quniform", "randint", "choice")
_REFUSED = {
    "corpus": "trials on other data are not comparable",
    "protocol": "trials on other folds are not comparable",
    "seed": "the luckiest seed is not a setting",
    "name": "it only names the run",
    "head": "only the attention head has epochs and a development score to search by",
    "readout": "only support vector machines and ridge regressions use it",
    "duration": "only support vector machines and ridge regressions use it",
    "svm": "its settings are chosen on inner folds already (svm_search)",
    "fit_search": "the sweep itself is the search",
    "svm_search": "a sweep searches the attention head",
    "classify": "it does not change the development score",
    "prosody": "only the system prosody uses it, which cannot be swept",
    "audio_cache": "where features are cached does not change a result",
    "test_conditions": "they change only the test audio, which a sweep does not use",
    "speaker_norm": "trials that use audio of test speakers are not comparable with those that do not",
    "pretraining_on": "only minicpc uses it, which cannot be swept",
    "fit.epochs": "each trial chooses its epoch on development speakers, up to fit.epochs",
    "fit.device": "where a trial runs is not a setting",
    "pretraining": "only minicpc uses it, which cannot be swept (except pretraining.model)",
}
_CHECKPOINT = "encoder.checkpoint"


@dataclass(frozen=True)
class SearchDimension:
    """One searched config key: a form of FORMS and its arguments (bounds; for choice, the values)."""

    key: str
    form: str
    arguments: tuple[Any, ...]

    @property
    def changes_features(self) -> bool:
        """Whether the key changes the features, or the network that computes them."""
        return _changes_features(self.key)


def parse_space(space: Mapping[str, Any], recipe: EmotionRecipe) -> list[SearchDimension]:
    """The dimensions of a space, sorted by key; paths of checkpoints are made absolute.

    Raises UserError for an unknown key or form, a key that cannot be searched, and values that do not fit the key.
    """
    fields = {field.name for field in dataclasses.fields(EmotionRecipe)}
    known = {key: value for key, value in configs.flat(recipe).items() if key.partition(".")[0] in fields}
    found = sorted((_dimension(key, entry, known) for key, entry in _entries(space)), key=lambda each: each.key)
    if not found:
        raise UserError("space is empty: name at least one key, such as fit.learning_rate: {loguniform: [1e-4, 1e-2]}")
    return found


def with_values(recipe: EmotionRecipe, values: Mapping[str, Any]) -> EmotionRecipe:
    """The recipe with these keys changed. Raises UserError for values that the config refuses."""
    fields = {field.name for field in dataclasses.fields(EmotionRecipe)}
    tree = {name: value for name, value in dataclasses.asdict(recipe).items() if name in fields}
    for key, value in values.items():
        *groups, last = key.split(".")
        branch = tree
        for group in groups:
            branch = branch[group]
        branch[last] = value
    return configs.build(EmotionRecipe, tree)


def _changes_features(key: str) -> bool:
    return not key.startswith(("fit.", "recogniser.")) and key != "encoder.learning_rate"


def _why_not(key: str) -> str | None:
    if key.startswith("pretraining.model."):
        return None
    return next((why for name, why in _REFUSED.items() if key == name or key.startswith(f"{name}.")), None)


def _entries(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, entry); keys may be dotted or nested, as in any config."""
    for key, entry in space.items():
        if isinstance(entry, Mapping) and not any(form in FORMS for form in entry) and _is_group(entry):
            yield from _entries(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def _is_group(entry: Mapping[str, Any]) -> bool:
    return bool(entry) and all(isinstance(value, Mapping) for value in entry.values())


def _dimension(key: str, entry: Any, known: Mapping[str, Any]) -> SearchDimension:
    if why := _why_not(key):
        raise UserError(f"space: {key} cannot be searched: {why}; give it one value in the config")
    if key not in known:
        searched = [name for name in known if _why_not(name) is None]
        groups = sorted({name.partition(".")[0] for name in searched})
        way_out = nearest(key, searched) or f"; searchable are {', '.join(groups)}"
        raise UserError(f"space: {key} is not a key of the recipe{way_out}")
    if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in FORMS:
        raise UserError(
            f"space: {key}: {entry!r} is not {{FORM: [...]}}, such as {{choice: [1, 2]}}; forms: {', '.join(FORMS)}"
        )
    form, given = next(iter(entry.items()))
    if not isinstance(given, list | tuple) or not given:
        raise UserError(f"space: {key}: {form} takes a list of values, not {given!r}")
    arguments = tuple(given)
    if form != "choice":
        _check_range(key, form, arguments)
    _check_type(key, form, arguments, known[key])
    for value in arguments if key == "system" else ():
        if why := system_of(value, "space: system").not_swept:
            raise UserError(f"space: system={value} cannot be swept: {why}; leave it out")
    if key == _CHECKPOINT:
        arguments = tuple(absolute_checkpoint(value) for value in arguments)
    return SearchDimension(key, form, arguments)


def _check_range(key: str, form: str, arguments: tuple[Any, ...]) -> None:
    if _changes_features(key):
        raise UserError(
            f"space: {key} changes the features, which are computed once for each of its values: use choice, not {form}"
        )
    count = 3 if form == "quniform" else 2
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in arguments)
    if len(arguments) != count or not numbers or not arguments[0] < arguments[1]:
        wanted = "[low, high, step]" if count == 3 else "[low, high]"
        raise UserError(f"space: {key}: {form} takes {wanted} with low below high, not {list(arguments)}")
    if form == "loguniform" and arguments[0] <= 0:
        raise UserError(f"space: {key}: loguniform takes a low above 0, not {arguments[0]}")
    if form == "quniform":
        _check_step(key, arguments)


def _check_step(key: str, arguments: tuple[Any, ...]) -> None:
    low, high, step = arguments
    if step <= 0 or abs((high - low) / step - round((high - low) / step)) > 1e-6:
        raise UserError(f"space: {key}: quniform takes a step above 0 that divides {high} - {low}, not {step}")


def _check_type(key: str, form: str, arguments: tuple[Any, ...], current: Any) -> None:
    whole = isinstance(current, int) and not isinstance(current, bool)
    if whole and form not in ("randint", "choice"):
        raise UserError(f"space: {key} is a whole number: draw it by randint or choice, not {form}")
    kinds = (int, float) if isinstance(current, float) else (type(current),)
    for value in arguments:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"space: {key}: {value!r} is not of the type of {current!r}, its value in the config")
