"""What a trial of a sweep tries: its values follow from the seed, its number and, with TPE, from the trials before it.

No state is kept between two trials, so a sweep that goes on after a kill draws as if it had never stopped: the values
of random search are the same whatever came between, and TPE (Bergstra et al., NeurIPS 2011; Optuna's sampler) learns
from the trials that are on record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpcscale.experiments.sweep.journal import TrialRecord
from cpcscale.experiments.sweep.space import SearchDimension

# Multiples of a step without what binary fractions add to them: 0.3, not 0.30000000000000004.
_DIGITS = 12


def suggest(
    dimensions: Sequence[SearchDimension], search: str, seed: int, number: int, known: Sequence[TrialRecord]
) -> dict[str, Any]:
    """The values by key of the trial of this number. `known` are the other trials, running or over; random has no use
    for them."""
    match search:
        case "optuna":
            return _tpe(dimensions, seed, number, known)
        case _:
            generator = np.random.default_rng([seed, number])
            return {each.key: _draw(each, generator) for each in dimensions}


def _draw(dimension: SearchDimension, generator: np.random.Generator) -> Any:
    arguments = dimension.arguments
    match dimension.form:
        case "uniform":
            return float(generator.uniform(*arguments))
        case "loguniform":
            return float(np.exp(generator.uniform(*np.log(arguments))).clip(*arguments))
        case "quniform":
            low, high, step = arguments
            return float(round(low + step * int(generator.integers(round((high - low) / step) + 1)), _DIGITS))
        case "randint":
            return int(generator.integers(*arguments))
        case _:
            return arguments[int(generator.integers(len(arguments)))]


def _tpe(dimensions: Sequence[SearchDimension], seed: int, number: int, known: Sequence[TrialRecord]) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A running trial counts as a bad one (constant liar), so that trials side by side do not try the same.
    key = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=key, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {each.key: _distribution(each) for each in dimensions}
    for record in sorted(known, key=lambda record: record.number):
        study.add_trial(_seen(record, dimensions, distributions))
    drawn = study.ask(distributions).params
    return {each.key: _shown(each, drawn[each.key]) for each in dimensions}


def _seen(record: TrialRecord, dimensions: Sequence[SearchDimension], distributions: dict[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial

    params = {
        each.key: each.arguments.index(record.values[each.key]) if each.form == "choice" else record.values[each.key]
        for each in dimensions
    }
    match record.status:
        case "running":
            return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
        case "stopped":
            # Its score is of the epoch it came to, not one among those that trained to the end.
            return create_trial(
                state=TrialState.PRUNED,
                params=params,
                distributions=distributions,
                intermediate_values={record.epochs: record.score},
            )
        case _:
            return create_trial(value=record.score, params=params, distributions=distributions)


def _shown(dimension: SearchDimension, drawn: Any) -> Any:
    match dimension.form:
        case "choice":
            return dimension.arguments[drawn]
        case "quniform":
            return round(drawn, _DIGITS)
        case _:
            return drawn


def _distribution(dimension: SearchDimension) -> Any:
    from optuna import distributions

    arguments = dimension.arguments
    match dimension.form:
        case "uniform":
            return distributions.FloatDistribution(*arguments)
        case "loguniform":
            return distributions.FloatDistribution(*arguments, log=True)
        case "quniform":
            return distributions.FloatDistribution(*arguments[:2], step=arguments[2])
        case "randint":
            return distributions.IntDistribution(arguments[0], arguments[1] - 1)
        case _:
            # By place in the list, because Optuna's own choices are texts and numbers alone.
            return distributions.CategoricalDistribution(range(len(arguments)))
