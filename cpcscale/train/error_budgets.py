"""The error budgets of a run: how many updates may be not finite and how many windows may fail to decode."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cpcscale.errors import UserError
from cpcscale.train.checkpoint import RunPosition
from cpcscale.train.recipe import Recipe


def check_finite(position: RunPosition, recipe: Recipe) -> None:
    """Raises UserError when more updates than train.nonfinite_budget were not finite."""
    budget = recipe.train.nonfinite_budget
    if position.nonfinite > budget:
        raise UserError(
            f"{position.nonfinite} updates had a loss or gradient that is not finite, past train.nonfinite_budget="
            f"{budget}: lower optim.learning_rate, set optim.clip_norm, or use train.precision=fp32"
        )


def exceeds_bad_budget(position: RunPosition, recipe: Recipe, seen: int) -> bool:
    """Whether more than the share feed.bad_budget of `seen` windows did not decode."""
    return position.bad > recipe.feed.bad_budget * seen


def bad_windows_error(position: RunPosition, recipe: Recipe, seen: int) -> UserError:
    """The error for an exceeded feed.bad_budget, with the causes and the worst shards of `position.bad_windows`."""
    return UserError(
        f"{position.bad} windows do not decode, past feed.bad_budget={recipe.feed.bad_budget} of {seen}, "
        f"{_worst(position.bad_windows)}: leave them out with `cpcscale index --exclude`, or raise the budget"
    )


def _worst(windows: list[dict[str, Any]]) -> str:
    """A phrase with the causes, and the shards with most of the bad windows."""
    causes = Counter(bad["cause"] for bad in windows).most_common()
    shards = Counter(bad["shard"] for bad in windows).most_common(3)
    listed = ", ".join(f"{shard} ({count})" for shard, count in shards)
    return f"{', '.join(f'{count} {cause}' for cause, count in causes)}, most of them in {listed}"
