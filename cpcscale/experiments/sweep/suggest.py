"""The values of a trial: they depend only on the seed, the trial's number and, with TPE, on the trials before it.

No state is kept between two trials, so a sweep that continues after a kill draws as if it had never stopped. TPE
(Bergstra et al., NeurIPS 2011; Optuna's sampler) learns from the trials in the journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpcscale.experiments.sweep.journal import TrialRecord
from cpcscale.experiments.sweep.space import SearchDimension

# quniform values are rounded to so many decimals: 0.3, not 0.30000000000000004.
_DIGITS = 12


def suggest(
    dimensions: Sequence[SearchDimension], search: str, seed: int, number: int, known: Sequence[TrialRecord]
) -> dict[str, Any]:
    """The values of trial `number`, by key. `known` are the other trials, running or ended; only optuna uses them."""
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
    # A running trial counts as a bad one (constant liar), so that parallel trials do not try the same values.
    key = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=key, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {each.key: _distribution(each) for each in dimensions}
    for record in sorted(known, key=lambda record: record.number):
        study.add_trial(_optuna_trial(record, dimensions, distributions))
    drawn = study.ask(distributions).params
    return {each.key: _value(each, drawn[each.key]) for each in dimensions}


def _optuna_trial(record: TrialRecord, dimensions: Sequence[SearchDimension], distributions: dict[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial

    params = {
        each.key: each.arguments.index(record.values[each.key]) if each.form == "choice" else record.values[each.key]
        for each in dimensions
    }
    match record.status:
        case "running":
            return create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
        case "stopped":
            # Its score is that of an early epoch, and does not compare with those of trials that trained to the end.
            return create_trial(
                state=TrialState.PRUNED,
                params=params,
                distributions=distributions,
                intermediate_values={record.epochs: record.score},
            )
        case _:
            return create_trial(value=record.score, params=params, distributions=distributions)


def _value(dimension: SearchDimension, drawn: Any) -> Any:
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
            # Indices into the list, because Optuna's choices can only be texts and numbers.
            return distributions.CategoricalDistribution(range(len(arguments)))
