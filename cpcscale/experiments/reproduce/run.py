"""The results table in one command: every system with every seed as a fine-tuning run of its own, below one parent run.

A reproduction that was killed or stopped goes on with the runs that are left, by the same command; so does one that got
another system or seed. A run of another config in the same place is refused, never mixed in.
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
from cpcscale.emotion.encoders.networks import encoder_digest, open_encoders
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
from cpcscale.experiments.finetune import absolute_inputs, finetune, identify
from cpcscale.experiments.many_runs import (
    FinetuneRun,
    UtterancePrediction,
    done_of,
    listed,
    predictions,
    publish,
    run_left,
    seconds_of,
    single,
)
from cpcscale.experiments.many_runs_config import ReproduceConfig, draws, with_seed
from cpcscale.experiments.tracked_run import tracked
from cpcscale.progress import note
from cpcscale.report.terminal.results import results_markdown
from cpcscale.runs.lease import Lease, hold

PAGE = "results.md"


@dataclass(frozen=True)
class _Plan:
    """A reproduction that was checked; the runs seed by seed, so that after the first the rest can be foretold."""

    config: ReproduceConfig
    corpus: Corpus
    kind: str
    folds: Folds
    runs: list[FinetuneRun]


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Runs what is not done yet and returns the table, which `run_dir` then holds as results.json and results.md.

    The table is `SystemTable.as_dict` with `seconds` (of all runs, by system) and `run_id`. With `dry_run` nothing is
    run or written, and the result is `listed`. Raises UserError before a file is written for whatever a user can get
    wrong, and HeldError when another driver is at this table.
    """
    plan = _planned(config)
    config = plan.config
    if config.dry_run:
        return listed(plan.runs, done_of(plan.runs))
    with hold(config.run_dir, config.lease, take_over=False, say=_say) as lease:
        return _tracked(plan, lease)


def _planned(config: ReproduceConfig) -> _Plan:
    config = dataclasses.replace(config, run_dir=storage.absolute(config.run_dir), **absolute_inputs(config))
    corpus = open_corpus(config.corpus)
    recipes = {system: config.recipe(system) for system in config.systems}
    opened = open_encoders(recipes)
    digests = {system: encoder_digest(encoder) for system, (encoder, _) in opened.items()}
    runs = []
    for number, seed in enumerate(config.seeds):
        for system in config.systems if number == 0 else [each for each in config.systems if draws(recipes[each])]:
            recipe = with_seed(recipes[system], seed)
            made = single(recipe, f"{system}-seed{seed}", config.run_dir, config.workers, config.tracking)
            identity = identify(made, corpus) | {"encoder": digests[system]}
            runs.append(FinetuneRun(made, corpus, opened[system], identity))
    kind = detect_kind(config.corpus) if config.corpus.kind == "auto" else config.corpus.kind
    return _Plan(config, corpus, kind, fold_splits(config, corpus), runs)


def _tracked(plan: _Plan, lease: Lease) -> dict[str, Any]:
    config, done = plan.config, done_of(plan.runs)
    with tracked(
        config.tracking,
        lease,
        config.run_dir,
        kind="reproduce",
        name=config.name or f"reproduce-{plan.corpus.name}",
        tags=_tags(plan),
        params={key: value for key, value in configs.flat(config).items() if key not in ("system", "seed")},
    ) as (tracker, summary):

        def start(run: FinetuneRun) -> FinetuneResult:
            return finetune(run.config, parent=tracker.run_id, corpus=run.corpus, opened=run.opened)

        run_left(plan.runs, done, start, config.workers, _say)
        table = _table(plan, done).as_dict() | {"seconds": seconds_of(plan.runs, done), "run_id": tracker.run_id}
        publish(config.run_dir, tracker, table, {PAGE: results_markdown(table).encode()})
        summary.update({f"ccc_mean_{row['system']}": row["ccc"]["mean"] for row in table["rows"]})
    return table


def _table(plan: _Plan, done: Mapping[str, FinetuneResult]) -> SystemTable:
    """The figures of all runs, over the utterances that every one of them tested."""
    corpus, folds, config = plan.corpus, plan.folds, plan.config
    heard = {run.name: dict(predictions(done[run.name].predictions_csv)) for run in plan.runs}
    of_parts = [one.partition if folds.protocol == "official" else "" for one in corpus.utterances]
    places = {one.key: place for place, one in enumerate(corpus.utterances)}
    tested = sorted({places[key] for keys in heard.values() for key in keys})
    part = min(of_parts[row] for row in tested)
    judged = [row for row in tested if of_parts[row] == part]
    # A system that hears no audio does not miss what cannot be read.
    rows = [row for row in judged if all(corpus.utterances[row].key in keys for keys in heard.values())]
    keys, groups = [corpus.utterances[row].key for row in rows], [folds.groups[row] for row in rows]
    subject = TableSubject(
        corpus=corpus.name,
        protocol=folds.protocol,
        marks=_marks(plan),
        utterances=len(rows),
        speakers=len(set(groups)),
        part=part,
        left_out=len(judged) - len(rows),
    )
    first = heard[plan.runs[0].name]
    return system_table(
        subject,
        corpus.labels_UP[rows],
        groups,
        [first[key].fold for key in keys],
        {system: _guesses(plan, done, heard, system, keys) for system in config.systems},
        reference=config.reference,
        published=published_scores(plan.kind),
        traits=traits_of([corpus.utterances[row] for row in rows]),
        seed=config.protocol.seed,
    )


def _guesses(
    plan: _Plan,
    done: Mapping[str, FinetuneResult],
    heard: Mapping[str, Mapping[str, UtterancePrediction]],
    system: str,
    keys: list[str],
) -> SystemPredictions:
    runs = [run for run in plan.runs if run.config.system == system]
    recalls = [done[run.name].recall for run in runs]
    return SystemPredictions(
        seeds=tuple(run.config.seed for run in runs),
        guess_SUP=np.stack([np.stack([heard[run.name][key].guess_P[""] for key in keys]) for run in runs]),
        recalls=tuple(value for value in recalls if value is not None),
    )


def _marks(plan: _Plan) -> tuple[str, ...]:
    """Those of any of the systems: the table has all of them."""
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
