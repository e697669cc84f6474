"""Evaluation beyond one number: many fine-tunings below one parent run, and what they come to together.

    robustness  each system trained on clean audio and tested on degraded
    learning    each system trained on shares of the training speakers' utterances
    cross       each system trained on all of one corpus and tested on all of the others

An evaluation that was killed or stopped goes on with the runs that are left, by the same command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus, CorpusConfig
from cpcscale.emotion.corpora.joined import join_corpora
from cpcscale.emotion.encoders.networks import encoder_digest, open_encoders
from cpcscale.emotion.finetune_result import FinetuneResult
from cpcscale.emotion.probe_selection import refuse_selected
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.evaluate.config import EvaluateConfig
from cpcscale.experiments.evaluate.table import table_of
from cpcscale.experiments.finetune import absolute_inputs, finetune, identify
from cpcscale.experiments.many_runs import FinetuneRun, done_of, listed, publish, run_left, seconds_of, single
from cpcscale.experiments.many_runs_config import draws, with_seed
from cpcscale.experiments.tracked_run import tracked
from cpcscale.progress import note
from cpcscale.report.terminal.evaluate import evaluate_files
from cpcscale.runs.lease import Lease, hold


@dataclass(frozen=True)
class _Evaluation:
    """An evaluation that was checked: its corpora by name, and its runs, each with what it is a figure of."""

    config: EvaluateConfig
    corpora: dict[str, Corpus]
    runs: list[FinetuneRun]
    points: dict[str, Any]  # by the name of the run: None, the share, or the corpora (train, test), test None for all


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs what is not done yet and returns the table, which `run_dir` then holds as results.json, page and plot.

    The table is that of `table_of` with `seconds` (of all runs, by system) and `run_id`. With `dry_run` nothing is run
    or written, and what comes back is `listed`. Raises UserError before a file is written for whatever a user can get
    wrong, and HeldError when another driver is at this evaluation.
    """
    plan = _planned(config)
    if plan.config.dry_run:
        return listed(plan.runs, done_of(plan.runs))
    with hold(plan.config.run_dir, plan.config.lease, take_over=False, say=_say) as lease:
        return _tracked(plan, lease)


def _planned(config: EvaluateConfig) -> _Evaluation:
    config = dataclasses.replace(config, run_dir=storage.absolute(config.run_dir), **absolute_inputs(config))
    settings = config.corpus_configs() if config.kind == "cross" else {"": config.corpus}
    corpora = {name: open_corpus(each) for name, each in settings.items()}
    _refuse_twice(corpora)
    recipes = {system: config.recipe(system) for system in config.systems}
    opened, digests = open_encoders(recipes), {}
    for system, (encoder, source) in opened.items():
        digests[system] = encoder_digest(encoder)
        # Here, by the names that the owners give: in joined corpora they are others.
        for corpus in corpora.values():
            refuse_selected(recipes[system], corpus, source)
    runs, points = [], {}
    for recipe in _recipes(config, recipes):
        for label, point, changed, corpus in _variants(config, recipe, settings, corpora):
            name = f"{label}{recipe.system}-seed{recipe.seed}"
            made = single(changed, name, config.run_dir, config.workers, config.tracking)
            fold_splits(made, corpus)
            identity = identify(made, corpus) | {"encoder": digests[recipe.system]}
            runs.append(FinetuneRun(made, corpus, opened[recipe.system], identity))
            points[name] = point
    return _Evaluation(config, corpora, runs, points)


def _recipes(config: EvaluateConfig, recipes: Mapping[str, EmotionRecipe]) -> Iterator[EmotionRecipe]:
    """Seed by seed, so that after the first the rest can be foretold."""
    for number, seed in enumerate(config.seeds):
        for recipe in recipes.values():
            if number == 0 or draws(recipe):
                yield with_seed(recipe, seed)


def _variants(
    config: EvaluateConfig,
    recipe: EmotionRecipe,
    settings: Mapping[str, CorpusConfig],
    corpora: Mapping[str, Corpus],
) -> Iterator[tuple[str, Any, EmotionRecipe, Corpus]]:
    """The runs of one system with one seed: how its name begins, its point, its recipe and its corpus."""
    match config.kind:
        case "robustness":
            yield "", None, recipe, corpora[""]
        case "learning":
            for share in config.shares:
                protocol = dataclasses.replace(recipe.protocol, train_share=share)
                yield f"share{share:g}-", share, dataclasses.replace(recipe, protocol=protocol), corpora[""]
        case _:
            official = dataclasses.replace(recipe.protocol, split="official")
            for name, corpus in corpora.items():
                yield f"{name}-", (name, name), dataclasses.replace(recipe, corpus=settings[name]), corpus
                across = dataclasses.replace(recipe, protocol=official)
                yield f"{name}-to-others-", (name, None), across, join_corpora(corpora, name)


def _refuse_twice(corpora: Mapping[str, Corpus]) -> None:
    seen: dict[str, str] = {}
    for name, corpus in corpora.items():
        if (other := seen.setdefault(corpus.digest, name)) != name:
            raise UserError(
                f"corpora.{name} holds the same as corpora.{other}: a corpus is no test of itself; leave one out"
            )


def _tracked(plan: _Evaluation, lease: Lease) -> dict[str, Any]:
    config, done = plan.config, done_of(plan.runs)
    with tracked(
        config.tracking,
        lease,
        config.run_dir,
        kind="evaluate",
        name=config.name or f"{config.kind}-{'-'.join(corpus.name for corpus in plan.corpora.values())}",
        tags=_tags(plan),
        params={key: value for key, value in configs.flat(config).items() if key not in ("system", "seed")},
    ) as (tracker, summary):

        def start(run: FinetuneRun) -> FinetuneResult:
            return finetune(run.config, parent=tracker.run_id, corpus=run.corpus, opened=run.opened)

        run_left(plan.runs, done, start, config.workers, _say)
        table = table_of(config.kind, plan.corpora, plan.runs, plan.points, done)
        table |= {"seconds": seconds_of(plan.runs, done), "run_id": tracker.run_id}
        publish(config.run_dir, tracker, table, evaluate_files(table))
        summary.update(_summary(table["rows"]))
    return table


def _tags(plan: _Evaluation) -> dict[str, str]:
    marks = dict.fromkeys(mark for corpus in plan.corpora.values() for mark in corpus.marks)
    return {
        "cpcscale.systems": ",".join(plan.config.systems),
        "cpcscale.corpus": ", ".join(corpus.name for corpus in plan.corpora.values()),
        "cpcscale.protocol": plan.config.protocol.split,
        "cpcscale.marks": ",".join(marks),
        "cpcscale.config_hash": configs.digest(plan.config),
        "cpcscale.corpus_hash": ",".join(corpus.digest for corpus in plan.corpora.values()),
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    # MLflow takes no plus in a name.
    places = [row["at"].replace("+", "").replace(" ", "_") for row in rows]
    return {f"ccc_mean_{row['system']}_{at}": row["ccc"]["mean"] for row, at in zip(rows, places, strict=True)}


def _say(text: str) -> None:
    note(f"evaluate: {text}")
