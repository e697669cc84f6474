"""Hyper-parameters of fine-tuning by Ray Tune. What is maximised is `inner_ccc`: the mean over folds of the best CCC so
far on the fold's development speakers. Test speakers are never heard; a sweep has no test score.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.cluster.finetune import absolute_inputs, cpus_each, describe, identify
from cpcscale.cluster.space import Dimension, apply, parse
from cpcscale.cluster.trials import METRIC, WORST, Children, trial
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import fold_splits
from cpcscale.emotion.features import Prepared, encoder_digest, open_encoder, prepare
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.tracking.tracker import Tracker, TrackingConfig, environment_tags

log = logging.getLogger(__name__)

RESULT = "result.json"
BEST = "best.yaml"
_QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@dataclass(kw_only=True)
class SweepConfig(EmotionRecipe):
    """A sweep: the recipe that trials start from, what they change, and where they run."""

    run_dir: str = "runs/sweep"  # folder (or s3:// prefix) of the sweep; a finished one is not run again
    workers: int = 2  # trials at a time; each gets its share of the cores
    trials: int = 16
    search: str = "random"  # random, or optuna (its TPE sampler)
    scheduler: str = "asha"  # asha stops the worse trials early; none lets all end
    grace_epochs: int = 1  # asha: no trial is stopped before
    reduction_factor: float = 3.0  # asha: one in so many goes on at each rung
    space: dict[str, Any] = field(default_factory=dict)  # config key: {form: arguments}, see space.py
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        configs.choose("search", self.search, ("random", "optuna"))
        configs.choose("scheduler", self.scheduler, ("asha", "none"))
        configs.at_least(1, workers=self.workers, trials=self.trials, grace_epochs=self.grace_epochs)
        configs.at_least(1.1, reduction_factor=self.reduction_factor)
        if self.system in ("mean", "minicpc"):
            reason = {"mean": "it has nothing to set", "minicpc": "every trial would pretrain a network for each fold"}
            raise UserError(f"system={self.system} is not swept: {reason[self.system]}; sweep another system")
        if self.grace_epochs > self.fit.epochs:
            raise UserError(f"grace_epochs={self.grace_epochs} is above fit.epochs={self.fit.epochs}: lower it")


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Runs all trials and returns the summary that `run_dir` then holds as result.json.

    It has trials (how many), inner_ccc, best (the winning values by key), results (one row a trial), system, corpus,
    protocol, marks, seconds, run_id. `run_dir/best.yaml` is the winner as a config for `cpcscale finetune`. A finished
    run_dir gives its summary back. Raises UserError before Ray starts for whatever a user can get wrong.
    """
    config = dataclasses.replace(config, run_dir=storage.absolute(config.run_dir), **absolute_inputs(config))
    dimensions = parse(config.space, config)
    corpus = open_corpus(config.corpus)
    fold_splits(config, corpus)
    encoder, source = open_encoder(config)
    identity = identify(config, corpus) | {"encoder": encoder_digest(encoder)}
    if (done := _finished(config.run_dir, identity)) is not None:
        log.warning("%s holds this sweep, finished: it is not run again", config.run_dir)
        return done
    started = time.monotonic()
    prepared = prepare(config, corpus)
    session.connect(config.workers)
    tags = describe(config, corpus, identity, source)
    tracker = Tracker.start(
        config.tracking,
        kind="sweep",
        name=config.name or f"sweep-{config.system}",
        run_dir=config.run_dir,
        tags=environment_tags() | tags,
        params=configs.flat(config),
    )
    status, summary = "FAILED", {}
    try:
        rows = _run_trials(
            config, dimensions, (corpus, prepared), Children(config.tracking, tracker.run_id, tags, config.trials)
        )
        result = _summary(config, corpus, rows) | {
            "seconds": time.monotonic() - started,
            "run_id": tracker.run_id,
            "run_dir": config.run_dir,
            "identity": identity,
        }
        _publish(config, result, tracker)
        status, summary = "FINISHED", {METRIC: result[METRIC]}
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status, summary)
    return result


def _run_trials(
    config: SweepConfig, dimensions: Sequence[Dimension], shared: tuple[Corpus, Prepared], children: Children
) -> list[dict[str, Any]]:
    # Tune's own output goes to stdout whatever its verbosity, its loggers write a folder a trial, and its handler of
    # interrupts swallows them.
    for name, value in _QUIET_TUNE.items():
        os.environ.setdefault(name, value)
    from ray import tune

    cpus = cpus_each(min(config.workers, config.trials))
    recipe = apply(config, {})
    trainable = tune.with_parameters(trial, config=recipe, shared=shared, threads=max(1, int(cpus)))
    folder = storage.join(config.run_dir, "ray")
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": cpus}),
        param_space={each.key: _draw(each) for each in dimensions},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=config.trials,
            max_concurrent_trials=config.workers,
            # A process of its own for each trial would import torch for longer than it trains.
            reuse_actors=True,
            search_alg=_searcher(config),
            scheduler=_scheduler(config),
            trial_name_creator=lambda trial: f"trial-{trial.trial_id.rpartition('_')[2]}",
        ),
        run_config=tune.RunConfig(name="sweep", storage_path=folder, verbose=0, callbacks=[_callback(children)]),
    )
    status = "KILLED"
    try:
        grid = tuner.fit()
        status = "FINISHED"
    finally:
        children.close(status)
        storage.remove(folder)
    return [_row(result) for result in grid]


def _callback(children: Children) -> Any:
    from ray import tune

    class Callback(tune.Callback):
        """Tune's events, handed on."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            children.start(str(trial), trial.config)

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            children.report(str(trial), result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            children.end(str(trial), "FINISHED")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            children.end(str(trial), "FAILED")

    return Callback()


def _draw(dimension: Dimension) -> Any:
    from ray import tune

    arguments = dimension.arguments
    match dimension.form:
        case "uniform":
            return tune.uniform(*arguments)
        case "loguniform":
            return tune.loguniform(*arguments)
        case "quniform":
            return tune.quniform(*arguments)
        case "randint":
            return tune.randint(*arguments)
        case _:
            return tune.choice(list(arguments))


def _searcher(config: SweepConfig) -> Any:
    match config.search:
        case "optuna":
            import optuna
            from ray.tune.search.optuna import OptunaSearch

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            return OptunaSearch(metric=METRIC, mode="max", sampler=optuna.samplers.TPESampler(seed=config.seed))
        case _:
            from ray.tune.search import BasicVariantGenerator

            return BasicVariantGenerator(random_state=np.random.RandomState(config.seed))


def _scheduler(config: SweepConfig) -> Any:
    from ray.tune import schedulers

    if config.scheduler == "none":
        return schedulers.FIFOScheduler()
    return schedulers.ASHAScheduler(
        max_t=config.fit.epochs, grace_period=config.grace_epochs, reduction_factor=config.reduction_factor
    )


def _row(result: Any) -> dict[str, Any]:
    metrics = result.metrics or {}
    row = {
        "values": dict(result.config),
        METRIC: float(metrics.get(METRIC, WORST)),
        "epochs": int(metrics.get("epoch", 0)),
    }
    error = metrics.get("error") or (str(result.error).strip().splitlines()[-1] if result.error else "")
    return row | ({"error": error} if error else {})


def _summary(config: SweepConfig, corpus: Corpus, rows: list[dict[str, Any]]) -> dict[str, Any]:
    trained = [row for row in rows if "error" not in row]
    if not trained:
        raise UserError(f"none of the {len(rows)} trials could be trained; the first: {rows[0]['error']}")
    best = max(trained, key=lambda row: row[METRIC])
    return {
        "system": config.system,
        "corpus": corpus.name,
        "protocol": config.protocol.name,
        "marks": list(corpus.marks),
        "trials": len(rows),
        METRIC: best[METRIC],
        "best": best["values"],
        "results": rows,
    }


def _publish(config: SweepConfig, result: dict[str, Any], tracker: Tracker) -> None:
    winner = configs.to_dict(apply(config, result["best"])) | {"run_dir": storage.join(config.run_dir, "best")}
    head = f"# The best of {result['trials']} trials: inner_ccc {result[METRIC]:.4f}, on development speakers alone.\n"
    files = {BEST: head + yaml.safe_dump(winner, sort_keys=False), RESULT: json.dumps(result, indent=1) + "\n"}
    for name, text in files.items():
        tracker.artifact(name, text)
        storage.write(storage.join(config.run_dir, name), text.encode())


def _finished(run_dir: str, identity: Mapping[str, str]) -> dict[str, Any] | None:
    url = storage.join(run_dir, RESULT)
    if not storage.exists(url):
        return None
    stored = json.loads(storage.read(url))
    if not isinstance(stored, dict) or METRIC not in stored or stored.get("identity") != identity:
        raise UserError(
            f"run_dir={run_dir} holds a finished run of another config or data: pass run_dir=FOLDER with a new one"
        )
    return stored
