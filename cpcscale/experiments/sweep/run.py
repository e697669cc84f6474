"""`cpcscale sweep`: hyper-parameters of fine-tuning, searched with Ray Tune.

A sweep maximises `inner_ccc`: the mean over folds of the best CCC so far on the fold's development speakers. It uses no
audio of test speakers and has no test score. After a kill, the same command runs the trials that are left.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.inputs import PreparedCorpus
from cpcscale.emotion.protocol.folds import fold_splits, marks
from cpcscale.emotion.protocol.splits import Folds
from cpcscale.errors import UserError
from cpcscale.experiments.finetune import absolute_inputs, identify, run_tags
from cpcscale.experiments.sweep.config import SweepConfig
from cpcscale.experiments.sweep.features import (
    FeatureVariant,
    encoders_digest,
    feature_key,
    feature_variants,
    prepare_variants,
)
from cpcscale.experiments.sweep.journal import METRIC, Journal, TrialRecord
from cpcscale.experiments.sweep.resources import TrialResources, plan_resources
from cpcscale.experiments.sweep.schedule import TrialSchedule
from cpcscale.experiments.sweep.space import SearchDimension, parse_space, with_values
from cpcscale.experiments.sweep.tracked_trials import TrackedTrials
from cpcscale.experiments.sweep.tune import run_trials
from cpcscale.experiments.tracked_run import about_recognisers, tracked_run
from cpcscale.progress import note
from cpcscale.runs.lease import Lease, hold, wait_until_free
from cpcscale.runs.ledger import Ledger
from cpcscale.storage.place import check_place
from cpcscale.tracking.about import About
from cpcscale.tracking.outbox import always
from cpcscale.tracking.tracker import settle

log = logging.getLogger(__name__)

RESULT, BEST, TABLE = "result.json", "best.yaml", "trials.csv"


@dataclass(frozen=True)
class _Plan:
    """A checked sweep: its dimensions, corpus and variants of features, and the digests that identify it."""

    config: SweepConfig
    dimensions: list[SearchDimension]
    corpus: Corpus
    folds: Folds
    variants: dict[str, FeatureVariant]
    identity: dict[str, str]

    @property
    def name(self) -> str:
        """The name of its tracked run."""
        return self.config.name or f"sweep-{self.config.system}"

    def about(self, title: str, what: str) -> About:
        """What MLflow's pages show of the sweep, or of a part of it."""
        return about_recognisers(title, what, self.config, {self.config.corpus.path: self.corpus})

    def tags(self, values: Mapping[str, Any] | None = None) -> dict[str, str]:
        """The tags of the trial with these values, or of the sweep (without an encoder if the encoder is searched)."""
        if values is None and len(self.variants) > 1:
            return run_tags(self.config, self.corpus, self.folds, self.identity, {})
        # Only the values that change the features: the others may not fit together, which fails that trial alone.
        chosen = {each.key: values[each.key] for each in self.dimensions if each.changes_features} if values else {}
        recipe = with_values(self.config, chosen)
        variant = self.variants[feature_key(recipe)] if values else next(iter(self.variants.values()))
        return run_tags(recipe, self.corpus, self.folds, self.identity, variant.opened[1])


def sweep(config: SweepConfig, *, resume: bool = False) -> dict[str, Any]:
    """Runs all trials, writes result.json, best.yaml and trials.csv to `run_dir`, and returns the summary.

    The summary (result.json) has trials (how many), inner_ccc, best (the best values by key), best_trial, results (a
    row a trial), system, corpus, protocol, marks, rungs (the epochs at which asha compares), share (the resources of a
    trial), seconds and run_id. best.yaml is the best recipe as a config for `cpcscale finetune`; trials.csv holds the
    rows. The summary of a finished run_dir is returned as it is, an unfinished one is continued; with `resume` there
    has to be one of the two. Mistakes of the user raise UserError before a file is written; raises HeldError when
    another driver holds this run folder.
    """
    run_dir = storage.absolute(config.run_dir)
    settle(config.tracking, run_dir, "sweep")
    plan = _planned(dataclasses.replace(config, run_dir=run_dir))
    config, journal = plan.config, Journal(plan.config.run_dir)
    if (done := _finished(config.run_dir, plan.identity)) is not None:
        _complete_tracking(plan, journal, done)
        log.warning("%s holds this sweep, finished: it is not run again", config.run_dir)
        return done
    _check_unfinished(journal, plan.identity, resume)
    ledger = Ledger(config.run_dir)
    before = wait_until_free(ledger, take_over=False, say=_say)
    check_place(ledger.folder, briefly=True)
    started = time.monotonic()
    with session.connected(1):
        resources = _resources(config)
        prepared = prepare_variants(plan.variants, plan.corpus)
        gone = before.holder.id if before.holder else ""
        with hold(config.run_dir, config.lease, take_over=False, say=_say, gone=gone) as lease:
            journal.open(plan.identity)
            _say_plan(config, resources, journal, _folds(config, prepared))
            return _tracked(plan, journal, prepared, resources, lease, started)


def _planned(config: SweepConfig) -> _Plan:
    config = dataclasses.replace(config, **absolute_inputs(config))
    dimensions = parse_space(config.space, config)
    corpus = open_corpus(config.corpus)
    folds = fold_splits(config, corpus)
    variants = feature_variants(config, dimensions)
    # A checkpoint counts by its weights (the digest of the encoder), not by its path.
    placeless = [each for each in dimensions if each.key != "encoder.checkpoint"]
    space = {each.key: {each.form: list(each.arguments)} for each in placeless}
    identity = identify(dataclasses.replace(config, space=space), corpus) | {"encoder": encoders_digest(variants)}
    return _Plan(config, dimensions, corpus, folds, variants, identity)


def _check_unfinished(journal: Journal, identity: Mapping[str, str], resume: bool) -> None:
    known = journal.identity()
    if known is None and resume:
        raise UserError(
            f"run_dir={storage.shown(journal.run_dir)} holds no unfinished sweep to resume: leave --resume out to "
            "start one"
        )
    if known is not None and known != identity:
        changed = [name for name, value in identity.items() if known.get(name) != value]
        raise UserError(
            f"run_dir={storage.shown(journal.run_dir)} holds an unfinished sweep with another {' and '.join(changed)}: "
            "pass run_dir=FOLDER with a new one, or remove it"
        )


def _resources(config: SweepConfig) -> TrialResources:
    cpus, gpus = ([node.get(name, 0.0) for node in session.live_nodes()] for name in ("CPU", "GPU"))
    return plan_resources(config.workers, config.trials, config.fit.device, cpus, gpus)


def _say(text: str) -> None:
    note(f"sweep: {text}")


def _folds(config: SweepConfig, prepared: Mapping[str, PreparedCorpus]) -> Folds:
    """The folds of the utterances whose audio could be read."""
    return next(iter(prepared.values())).folds


def _say_plan(config: SweepConfig, resources: TrialResources, journal: Journal, folds: Folds) -> None:
    ended = len(journal.ended())
    before = f", {ended} of them done before" if ended else ""
    rungs = ", ".join(str(rung) for rung in config.rungs)
    training = f"{len(folds.splits)} folds of a trial train together, at most {config.fit.epochs} epochs"
    stopping = (
        f"asha compares {METRIC} after epoch {rungs} and continues the best 1 in {config.reduction_factor:g}"
        if config.rungs
        else "no trial is stopped early"
    )
    _say(f"{config.trials} trials{before}, {resources.described()}; {training}; {stopping}")


def _tracked(
    plan: _Plan,
    journal: Journal,
    prepared: Mapping[str, PreparedCorpus],
    resources: TrialResources,
    lease: Lease,
    started: float,
) -> dict[str, Any]:
    config = plan.config
    with contextlib.ExitStack() as stack:
        tracker, summary = stack.enter_context(
            tracked_run(
                config.tracking,
                lease,
                config.run_dir,
                kind="sweep",
                name=plan.name,
                tags=plan.tags(),
                params=configs.flat(config),
                about=plan.about(
                    f"{plan.name} on {plan.corpus.name}", f"Sweep of {config.system}, {config.trials} trials"
                ),
            )
        )
        runs = TrackedTrials(config.tracking, tracker.run_id, journal, plan, config.trials, lease.held)
        # If another driver took the sweep over, its trials are that driver's.
        stack.callback(lambda: runs.close() if lease.held(now=True) else None)
        runs.adopt_existing()
        run_trials(TrialSchedule(config, plan.dimensions, journal, runs), prepared, resources)
        best = _best(journal)
        runs.add_folds(best)
        result = _summary(config, plan.corpus, _folds(config, prepared), journal.ended(), best) | {
            "share": dataclasses.asdict(resources),
            "seconds": time.monotonic() - started,
            "run_id": tracker.run_id,
            "run_dir": config.run_dir,
            "identity": plan.identity,
        }
        files = _files(config, result)
        for name, text in files.items():
            tracker.artifact(name, text)
        summary[METRIC] = result[METRIC]
    # result.json is written last: a run folder that has it is complete, and so are its tracked runs.
    for name, text in files.items():
        storage.write(storage.join(config.run_dir, name), text.encode())
    journal.clear()
    return result


def _complete_tracking(plan: _Plan, journal: Journal, done: Mapping[str, Any]) -> None:
    """Completes the trials' runs for the driver that finished this sweep, and removes the records that it left."""
    config = plan.config
    if journal.identity() is not None:
        journal.open(plan.identity)
        runs = TrackedTrials(config.tracking, done["run_id"], journal, plan, config.trials, always)
        runs.adopt_existing()
        runs.add_folds(_best(journal))
        runs.close()
        journal.clear()


def _best(journal: Journal) -> TrialRecord:
    records = journal.ended()
    trained = [record for record in records if record.status != "failed"]
    if not trained:
        # So that the same command tries all trials again, once the cause is removed.
        journal.clear()
        raise UserError(
            f"none of the {len(records)} trials could be trained. Trial {records[0].number}: {records[0].error}"
        )
    return max(trained, key=lambda record: record.score)


def _summary(
    config: SweepConfig, corpus: Corpus, folds: Folds, records: Sequence[TrialRecord], best: TrialRecord
) -> dict[str, Any]:
    return {
        "system": with_values(config, best.values).system,
        "corpus": corpus.name,
        "protocol": folds.protocol,
        "marks": marks(config, corpus, folds),
        "trials": len(records),
        METRIC: best.score,
        "best": best.values,
        "best_trial": best.number,
        "folds": len(folds.splits),
        "rungs": config.rungs,
        "results": [_row(record) for record in records],
    }


def _row(record: TrialRecord) -> dict[str, Any]:
    row = {
        "trial": record.number,
        "status": record.status,
        METRIC: record.score,
        "epochs": record.epochs,
        "seconds": round(record.seconds, 3),
        "restarts": record.restarts,
        "values": record.values,
    }
    return row | ({"error": record.error} if record.error else {})


def _files(config: SweepConfig, result: Mapping[str, Any]) -> dict[str, str]:
    """The files of a finished sweep by name, the result last."""
    winner = configs.to_dict(with_values(config, result["best"])) | {"run_dir": storage.join(config.run_dir, "best")}
    head = f"# The best of {result['trials']} trials: inner_ccc {result[METRIC]:.4f}, on development speakers alone.\n"
    return {
        BEST: head + yaml.safe_dump(winner, sort_keys=False),
        TABLE: _table(result["results"]),
        RESULT: json.dumps(result, indent=1) + "\n",
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns, keys = ("trial", "status", METRIC, "epochs", "seconds", "restarts"), list(rows[0]["values"])
    writer.writerow([*columns, *keys, "error"])
    for row in rows:
        values = [row["values"][key] for key in keys]
        writer.writerow([*(row[column] for column in columns), *values, row.get("error", "")])
    return out.getvalue()


def _finished(run_dir: str, identity: Mapping[str, str]) -> dict[str, Any] | None:
    url = storage.join(run_dir, RESULT)
    if not storage.exists(url):
        return None
    try:
        stored = configs.read_json(storage.read(url))
    except ValueError as error:
        raise UserError(f"{url} is not the result of a sweep ({error}): choose another run_dir") from None
    if not isinstance(stored, dict) or METRIC not in stored or stored.get("identity") != identity:
        raise UserError(
            f"run_dir={run_dir} holds a finished run with another config or data: pass run_dir=FOLDER with a new one"
        )
    return stored
