"""`cpcscale evaluate`: many fine-tunings below one tracked parent run, and a table of their results.

    robustness  each system trained on clean audio and tested on degraded
    learning    each system trained on shares of the training speakers' utterances
    cross       each system trained on all of one corpus and tested on all of the others
    encoders    encoders and classic systems on several corpora, with tests over all of them

After a kill, the same command runs what is left.
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
from cpcscale.emotion.encoders.arrays import arrays_of
from cpcscale.emotion.encoders.huggingface import PREFIX
from cpcscale.emotion.encoders.networks import OpenedEncoder, encoder_digest
from cpcscale.emotion.finetune_result import FinetuneResult
from cpcscale.emotion.probe_selection import refuse_selected
from cpcscale.emotion.protocol.folds import fold_splits
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.experiments.encoders import open_encoders
from cpcscale.experiments.evaluate.config import Arm, EvaluateConfig
from cpcscale.experiments.evaluate.encoders import encoder_tests
from cpcscale.experiments.evaluate.table import evaluation_table
from cpcscale.experiments.finetune import absolute_inputs, finetune, identify
from cpcscale.experiments.many_runs import (
    FinetuneRun,
    dry_run_table,
    finished_results,
    metric_name,
    publish,
    read_predictions,
    run_config,
    run_remaining,
    seconds_by_system,
)
from cpcscale.experiments.many_runs_config import depends_on_seed, with_seed
from cpcscale.experiments.tracked_run import about_recognisers, tracked_run
from cpcscale.progress import note
from cpcscale.report.terminal.evaluate import evaluate_files
from cpcscale.runs.lease import Lease, hold
from cpcscale.tracking.tracker import settle


@dataclass(frozen=True)
class _Evaluation:
    """A checked evaluation: its corpora by name, its runs, and the point of the table that each run belongs to."""

    config: EvaluateConfig
    corpora: dict[str, Corpus]
    runs: list[FinetuneRun]
    # By the run's name. robustness: None; learning: the share; cross: (train, test), where test None means all others;
    # encoders: (corpus, encoder), where "" is none.
    points: dict[str, Any]
    # Why an encoder is not run.
    not_run: dict[str, str]


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs what is not done yet, writes results.json, a page and a plot to `run_dir`, and returns the table.

    The table is that of `evaluation_table` with `seconds` (of all runs, by system) and `run_id`. With `dry_run` nothing
    is run or written, and `dry_run_table` is returned. Mistakes of the user raise UserError before a file is written;
    raises HeldError when another driver holds this run folder.
    """
    config = dataclasses.replace(config, run_dir=storage.absolute(config.run_dir))
    if not config.dry_run:
        settle(config.tracking, config.run_dir, "evaluate")
    plan = _planned(config)
    if plan.config.dry_run:
        return dry_run_table(plan.runs, finished_results(plan.runs))
    with hold(plan.config.run_dir, plan.config.lease, take_over=False, say=_say) as lease:
        return _tracked(plan, lease)


def _planned(config: EvaluateConfig) -> _Evaluation:
    config = dataclasses.replace(config, **absolute_inputs(config))
    settings = _corpus_settings(config)
    corpora = {name: open_corpus(each) for name, each in settings.items()}
    _refuse_same_corpus(corpora)
    arms = [dataclasses.replace(arm, recipe=_absolute(arm.recipe)) for arm in config.arms()]
    opened, not_run = _opened(arms)
    arms = [arm for arm in arms if arm.name in opened]
    digests = {name: encoder_digest(encoder) for name, (encoder, _) in opened.items()}
    for arm in arms:
        # Checked on each corpus alone, because joining corpora changes the names of speakers and utterances.
        for corpus in corpora.values():
            refuse_selected(arm.recipe, corpus, opened[arm.name][1])
    runs, points = [], {}
    for arm in _with_seeds(config, arms):
        for label, point, changed, corpus in _variants(config, arm, settings, corpora):
            name = f"{label}{arm.name}-seed{arm.recipe.seed}"
            single = run_config(changed, name, config.run_dir, config.workers, config.tracking)
            fold_splits(single, corpus)
            identity = identify(single, corpus) | {"encoder": digests[arm.name]}
            runs.append(FinetuneRun(single, corpus, opened[arm.name], identity))
            points[name] = point
    return _Evaluation(config, corpora, runs, points, not_run)


def _corpus_settings(config: EvaluateConfig) -> dict[str, CorpusConfig]:
    """The corpora of an evaluation by name; a single one has the name ""."""
    return config.corpus_configs() if config.corpora else {"": config.corpus}


def _opened(arms: Sequence[Arm]) -> tuple[dict[str, OpenedEncoder], dict[str, str]]:
    """(the encoder of each arm by its name, why encoders are not run whose weights of the transformers library are
    missing)."""
    opened: dict[str, OpenedEncoder] = {}
    not_run: dict[str, str] = {}
    for encoder in dict.fromkeys(arm.encoder for arm in arms):
        recipes = {arm.name: arm.recipe for arm in arms if arm.encoder == encoder}
        try:
            opened |= open_encoders(recipes)
        except UserError as error:
            if not encoder or not any(each.encoder.checkpoint.startswith(PREFIX) for each in recipes.values()):
                raise
            not_run[encoder] = str(error)
    return opened, not_run


def _absolute(recipe: EmotionRecipe) -> EmotionRecipe:
    return dataclasses.replace(recipe, **absolute_inputs(recipe))


def _with_seeds(config: EvaluateConfig, arms: Sequence[Arm]) -> Iterator[Arm]:
    """In order of seeds, so that after the first the time of the rest can be estimated."""
    for number, seed in enumerate(config.seeds):
        for arm in arms:
            if number == 0 or depends_on_seed(arm.recipe):
                yield dataclasses.replace(arm, recipe=with_seed(arm.recipe, seed))


def _variants(
    config: EvaluateConfig,
    arm: Arm,
    settings: Mapping[str, CorpusConfig],
    corpora: Mapping[str, Corpus],
) -> Iterator[tuple[str, Any, EmotionRecipe, Corpus]]:
    """The runs of one system with one seed: (prefix of the name, point of the table, recipe, corpus)."""
    recipe = arm.recipe
    match config.kind:
        case "robustness":
            yield "", None, recipe, corpora[""]
        case "learning":
            for share in config.shares:
                protocol = dataclasses.replace(recipe.protocol, train_share=share)
                yield f"share{share:g}-", share, dataclasses.replace(recipe, protocol=protocol), corpora[""]
        case "encoders":
            for name, corpus in corpora.items():
                # Found from fixed features alone.
                classify = any(one.category for one in corpus.utterances) and not recipe.trains_encoder
                changed = dataclasses.replace(recipe, corpus=settings[name], classify=classify)
                yield f"{name}-", (name, arm.encoder), changed, corpus
        case _:
            official = dataclasses.replace(recipe.protocol, split="official")
            for name, corpus in corpora.items():
                yield f"{name}-", (name, name), dataclasses.replace(recipe, corpus=settings[name]), corpus
                across = dataclasses.replace(recipe, protocol=official)
                yield f"{name}-to-others-", (name, None), across, join_corpora(corpora, name)


def _refuse_same_corpus(corpora: Mapping[str, Corpus]) -> None:
    seen: dict[str, str] = {}
    for name, corpus in corpora.items():
        if (other := seen.setdefault(corpus.digest, name)) != name:
            raise UserError(
                f"corpora.{name} holds the same utterances as corpora.{other}, so it is no test: leave one out"
            )


def _tracked(plan: _Evaluation, lease: Lease) -> dict[str, Any]:
    config, done = plan.config, finished_results(plan.runs)
    name = config.name or f"{config.kind}-{'-'.join(corpus.name for corpus in plan.corpora.values())}"
    what = f"Evaluation of {config.kind}: {len(plan.runs)} fine-tunings of {', '.join(config.systems)}"
    settings = _corpus_settings(config)
    corpora = {settings[key].path: corpus for key, corpus in plan.corpora.items()}
    with tracked_run(
        config.tracking,
        lease,
        config.run_dir,
        kind="evaluate",
        name=name,
        tags=_tags(plan),
        params={key: value for key, value in configs.flat(config).items() if key not in ("system", "seed")},
        about=about_recognisers(name, what, config, corpora),
    ) as (tracker, summary):

        def start(run: FinetuneRun) -> FinetuneResult:
            return finetune(run.config, parent=tracker.run_id, corpus=run.corpus, opened=run.opened)

        run_remaining(plan.runs, done, start, _say)
        by_run = {run.name: dict(read_predictions(done[run.name].predictions_csv)) for run in plan.runs}
        table = evaluation_table(config.kind, plan.corpora, plan.runs, plan.points, done, by_run)
        if config.kind == "encoders":
            tests = encoder_tests(plan.corpora, plan.runs, plan.points, by_run, config.protocol.seed)
            table |= {"encoders": _encoders(plan), "tests": tests, "not_run": plan.not_run}
        table |= {"seconds": seconds_by_system(plan.runs, done), "run_id": tracker.run_id}
        publish(config.run_dir, tracker, table, evaluate_files(table))
        summary.update(_summary(table["rows"]))
    return table


def _encoders(plan: _Evaluation) -> dict[str, dict[str, Any]]:
    """What each encoder is, by name: `parameters` of the frames, and of each pretraining `urls`, `updates`, `hours`."""
    found: dict[str, dict[str, Any]] = {}
    for run in plan.runs:
        network, source = run.opened
        name = plan.points[run.name][1]
        if network is None or not run.config.definition.takes_weights:
            continue
        parameters = sum(array.size for array in arrays_of(network, left_out=network.unused).values())
        row = found.setdefault(name, {"parameters": parameters, "urls": [], "updates": [], "hours": []})
        if (url := str(source["url"])) not in row["urls"]:
            row["urls"].append(url)
            row["updates"].append(source.get("step"))
            row["hours"].append(source["audio_s"] / 3600 if "audio_s" in source else None)
    return found


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
    places = [row["at"].replace("+", "").replace(" ", "_").replace(":", "") for row in rows]
    return {f"{metric_name(row['system'])}_{at}": row["ccc"]["mean"] for row, at in zip(rows, places, strict=True)}


def _say(text: str) -> None:
    note(f"evaluate: {text}")
