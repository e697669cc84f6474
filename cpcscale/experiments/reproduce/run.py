"""The results table in one command: one fine-tuning for each system and seed, below one tracked parent run.

After a kill, or when a system or seed is added, the same command runs what is left. A run of another config in the same
folder is refused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.emotion.corpora import detect_kind, open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.encoders.networks import encoder_digest
from cpcscale.emotion.finetune_result import FinetuneResult
from cpcscale.emotion.protocol.folds import fold_splits, marks
from cpcscale.emotion.protocol.splits import Folds
from cpcscale.emotion.scores.by_group import traits_of
from cpcscale.emotion.scores.system_table import (
    SystemPredictions,
    SystemTable,
    TableSubject,
    published_scores,
    system_table,
)
from cpcscale.experiments.encoders import open_encoders
from cpcscale.experiments.finetune import absolute_inputs, finetune, identify
from cpcscale.experiments.many_runs import (
    FinetuneRun,
    UtterancePrediction,
    dry_run_table,
    finished_results,
    metric_name,
    publish,
    read_predictions,
    run_config,
    run_remaining,
    seconds_by_system,
)
from cpcscale.experiments.many_runs_config import ReproduceConfig, depends_on_seed, with_seed
from cpcscale.experiments.tracked_run import about_recognisers, tracked_run
from cpcscale.progress import note
from cpcscale.report.terminal.results import results_markdown
from cpcscale.runs.lease import Lease, hold
from cpcscale.tracking.tracker import settle

PAGE = "results.md"


@dataclass(frozen=True)
class _Plan:
    """A checked reproduction, its runs in order of seeds: after the first, the time of the rest can be estimated."""

    config: ReproduceConfig
    corpus: Corpus
    kind: str
    folds: Folds
    runs: list[FinetuneRun]


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Runs what is not done yet, writes results.json and results.md to `run_dir`, and returns the table.

    The table is `SystemTable.as_dict` with `seconds` (of all runs, by system) and `run_id`. With `dry_run` nothing is
    run or written, and `dry_run_table` is returned. Mistakes of the user raise UserError before a file is written;
    raises HeldError when another driver holds this run folder.
    """
    config = dataclasses.replace(config, run_dir=storage.absolute(config.run_dir))
    if not config.dry_run:
        settle(config.tracking, config.run_dir, "reproduce")
    plan = _planned(config)
    config = plan.config
    if config.dry_run:
        return dry_run_table(plan.runs, finished_results(plan.runs))
    with hold(config.run_dir, config.lease, take_over=False, say=_say) as lease:
        return _tracked(plan, lease)


def _planned(config: ReproduceConfig) -> _Plan:
    config = dataclasses.replace(config, **absolute_inputs(config))
    corpus = open_corpus(config.corpus)
    recipes = {system: config.recipe(system) for system in config.systems}
    opened = open_encoders(recipes)
    digests = {system: encoder_digest(encoder) for system, (encoder, _) in opened.items()}
    runs = []
    seeded = [system for system in config.systems if depends_on_seed(recipes[system])]
    for number, seed in enumerate(config.seeds):
        for system in seeded if number else config.systems:
            recipe = with_seed(recipes[system], seed)
            single = run_config(recipe, f"{system}-seed{seed}", config.run_dir, config.workers, config.tracking)
            identity = identify(single, corpus) | {"encoder": digests[system]}
            runs.append(FinetuneRun(single, corpus, opened[system], identity))
    kind = detect_kind(config.corpus) if config.corpus.kind == "auto" else config.corpus.kind
    return _Plan(config, corpus, kind, fold_splits(config, corpus), runs)


def _tracked(plan: _Plan, lease: Lease) -> dict[str, Any]:
    config, done = plan.config, finished_results(plan.runs)
    what = f"{len(plan.runs)} fine-tunings of {', '.join(config.systems)}"
    name = config.name or f"reproduce-{plan.corpus.name}"
    with tracked_run(
        config.tracking,
        lease,
        config.run_dir,
        kind="reproduce",
        name=name,
        tags=_tags(plan),
        params={key: value for key, value in configs.flat(config).items() if key not in ("system", "seed")},
        about=about_recognisers(name, what, config, {config.corpus.path: plan.corpus}),
    ) as (tracker, summary):

        def start(run: FinetuneRun) -> FinetuneResult:
            return finetune(run.config, parent=tracker.run_id, corpus=run.corpus, opened=run.opened)

        run_remaining(plan.runs, done, start, _say)
        table = _table(plan, done).as_dict() | {"seconds": seconds_by_system(plan.runs, done), "run_id": tracker.run_id}
        # As the runs were: a library that came later would give another kind of features.
        table["shown"] = {run.config.system: done[run.name].shown or run.config.system for run in plan.runs}
        publish(config.run_dir, tracker, table, {PAGE: results_markdown(table).encode()})
        summary.update({metric_name(row["system"]): row["ccc"]["mean"] for row in table["rows"]})
    return table


def _table(plan: _Plan, done: Mapping[str, FinetuneResult]) -> SystemTable:
    """The figures of all runs, over the utterances that every run tested."""
    corpus, folds, config = plan.corpus, plan.folds, plan.config
    predicted = {run.name: dict(read_predictions(done[run.name].predictions_csv)) for run in plan.runs}
    parts = [one.partition if folds.protocol == "official" else "" for one in corpus.utterances]
    places = {one.key: place for place, one in enumerate(corpus.utterances)}
    tested = sorted({places[key] for keys in predicted.values() for key in keys})
    part = min(parts[row] for row in tested)
    scored = [row for row in tested if parts[row] == part]
    # A system without audio, such as mean, predicts also for files that the others could not read.
    rows = [row for row in scored if all(corpus.utterances[row].key in keys for keys in predicted.values())]
    keys, groups = [corpus.utterances[row].key for row in rows], [folds.groups[row] for row in rows]
    subject = TableSubject(
        corpus=corpus.name,
        protocol=folds.protocol,
        marks=_marks(plan),
        utterances=len(rows),
        speakers=len(set(groups)),
        part=part,
        left_out=len(scored) - len(rows),
    )
    first = predicted[plan.runs[0].name]
    return system_table(
        subject,
        corpus.labels_UP[rows],
        groups,
        [first[key].fold for key in keys],
        {system: _predictions(plan, done, predicted, system, keys) for system in config.systems},
        reference=config.reference,
        published=published_scores(plan.kind),
        traits=traits_of([corpus.utterances[row] for row in rows]),
        seed=config.protocol.seed,
    )


def _predictions(
    plan: _Plan,
    done: Mapping[str, FinetuneResult],
    predicted: Mapping[str, Mapping[str, UtterancePrediction]],
    system: str,
    keys: list[str],
) -> SystemPredictions:
    runs = [run for run in plan.runs if run.config.system == system]
    recalls = [done[run.name].recall for run in runs]
    return SystemPredictions(
        seeds=tuple(run.config.seed for run in runs),
        guess_SUP=np.stack([np.stack([predicted[run.name][key].guess_P[""] for key in keys]) for run in runs]),
        recalls=tuple(value for value in recalls if value is not None),
    )


def _marks(plan: _Plan) -> tuple[str, ...]:
    """The marks of all systems together."""
    of_all = (marks(plan.config.recipe(system), plan.corpus, plan.folds) for system in plan.config.systems)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(of_all)))


def _tags(plan: _Plan) -> dict[str, str]:
    return {
        "cpcscale.systems": ",".join(plan.config.systems),
        "cpcscale.corpus": plan.corpus.name,
        "cpcscale.protocol": plan.folds.protocol,
        "cpcscale.marks": ",".join(_marks(plan)),
        "cpcscale.config_hash": configs.digest(plan.config),
        "cpcscale.corpus_hash": plan.corpus.digest,
    }


def _say(text: str) -> None:
    note(f"reproduce: {text}")
