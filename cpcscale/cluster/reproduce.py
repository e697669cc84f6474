"""The results table in one command: every system with every seed as a fine-tuning run of its own, below one parent run.

A reproduction that was killed or stopped goes on with the runs that are left, by the same command; so does one that got
another system or seed. A run of another config in the same place is refused, never mixed in.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpcscale import config as configs
from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.cluster.finetune import FinetuneConfig, absolute_inputs, finetune, finished, identify
from cpcscale.cluster.reproduce_spec import RECIPE_FIELDS, ReproduceConfig, draws, with_seed
from cpcscale.emotion.corpora import open_corpus, recognised
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import FinetuneResult, fold_splits, marks
from cpcscale.emotion.encoders import encoder_digest, open_encoder
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.emotion.results import Guesses, Results, Subject, published, results
from cpcscale.emotion.splits import Folds
from cpcscale.objective.ccc import PRIMITIVES
from cpcscale.progress import duration, note
from cpcscale.tracking.tracker import Tracker, environment_tags
from cpcscale.train.lease import Lease, hold

RESULTS, PAGE = "results.json", "results.md"


@dataclass(frozen=True)
class _Run:
    """One system with one seed: its config, and digests of what its result follows from."""

    config: FinetuneConfig
    identity: dict[str, str]

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True)
class _Plan:
    """A reproduction that was checked; the runs seed by seed, so that after the first the rest can be foretold."""

    config: ReproduceConfig
    corpus: Corpus
    kind: str
    folds: Folds
    runs: list[_Run]


def reproduce(config: ReproduceConfig, page: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
    """Runs what is not done yet and returns the table, which `run_dir` then holds as results.json and results.md.

    The table is that of Results.as_dict with `seconds` (of all runs, by system) and `run_id`; `page` turns it into the
    text of results.md. With `dry_run` nothing is run or written, and what comes back is `forecast`. Raises UserError
    before a file is written for whatever a user can get wrong, and HeldError when another driver is at this table.
    """
    plan = _planned(config)
    config = plan.config
    if config.dry_run:
        return forecast(plan, _done(plan))
    with hold(config.run_dir, config.lease, take_over=False, say=_say) as lease:
        return _tracked(plan, lease, page)


def forecast(plan: _Plan, done: Mapping[str, FinetuneResult]) -> dict[str, Any]:
    """{dry_run, runs, done, hours, unknown}: a row a run with `name`, `system`, `seed`, `done` and `seconds`.

    The seconds of a run that is to come are the mean of the finished ones of its system here, None where there is none.
    `hours` adds up what is known of the runs to come; `unknown` names the systems of the others.
    """
    rows: list[dict[str, Any]] = []
    for run in plan.runs:
        result, expected = done.get(run.name), _expected_s(run, done)
        seconds = expected if result is None else result.seconds
        row = {"name": run.name, "system": run.config.system, "seed": run.config.seed, "seconds": seconds}
        rows.append(row | {"done": result is not None})
    coming = [row for row in rows if not row["done"]]
    return {
        "dry_run": True,
        "runs": rows,
        "done": len(rows) - len(coming),
        "hours": sum(row["seconds"] or 0.0 for row in coming) / 3600,
        "unknown": list(dict.fromkeys(row["system"] for row in coming if row["seconds"] is None)),
    }


def _planned(config: ReproduceConfig) -> _Plan:
    config = dataclasses.replace(config, run_dir=storage.absolute(config.run_dir), **absolute_inputs(config))
    corpus = open_corpus(config.corpus)
    recipes = {system: config.recipe(system) for system in config.systems}
    digests = {system: encoder_digest(open_encoder(recipe)[0]) for system, recipe in recipes.items()}
    runs = []
    for number, seed in enumerate(config.seeds):
        for system in config.systems if number == 0 else [each for each in config.systems if draws(recipes[each])]:
            single = _single(config, with_seed(recipes[system], seed))
            runs.append(_Run(single, identify(single, corpus) | {"encoder": digests[system]}))
    kind = recognised(config.corpus) if config.corpus.kind == "auto" else config.corpus.kind
    return _Plan(config, corpus, kind, fold_splits(config, corpus), runs)


def _single(config: ReproduceConfig, recipe: EmotionRecipe) -> FinetuneConfig:
    """The run of this recipe, in its place below the reproduction."""
    values = {name: getattr(recipe, name) for name in RECIPE_FIELDS}
    name = f"{recipe.system}-seed{recipe.seed}"
    place = {"run_dir": storage.join(config.run_dir, name), "workers": config.workers, "tracking": config.tracking}
    return FinetuneConfig(**values | place | {"name": name})


def _done(plan: _Plan) -> dict[str, FinetuneResult]:
    found = {run.name: finished(run.config.run_dir, run.identity) for run in plan.runs}
    return {name: result for name, result in found.items() if result is not None}


def _tracked(plan: _Plan, lease: Lease, page: Callable[[Mapping[str, Any]], str]) -> dict[str, Any]:
    config, done = plan.config, _done(plan)
    tracker = Tracker.start(
        config.tracking,
        kind="reproduce",
        name=config.name or f"reproduce-{plan.corpus.name}",
        run_dir=config.run_dir,
        tags=environment_tags() | _tags(plan),
        params={key: value for key, value in configs.flat(config).items() if key not in ("system", "seed")},
        allowed=lease.held,
    )
    status, summary = "FAILED", {}
    try:
        _run_all(plan, done, tracker.run_id)
        table = _table(plan, done).as_dict() | {"seconds": _seconds(plan, done), "run_id": tracker.run_id}
        for name, text in ((PAGE, page(table)), (RESULTS, json.dumps(table, indent=1) + "\n")):
            tracker.artifact(name, text)
            storage.write(storage.join(config.run_dir, name), text.encode())
        status, summary = "FINISHED", {f"ccc_mean_{row['system']}": row["ccc"]["mean"] for row in table["rows"]}
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        # The tracked run is another driver's when this one was overtaken.
        if lease.held(now=True):
            tracker.finish(status, summary)
    return table


def _run_all(plan: _Plan, done: dict[str, FinetuneResult], parent: str) -> None:
    """Adds the results of the runs that are not in `done` to it, one run after the other in one Ray session."""
    todo = [run for run in plan.runs if run.name not in done]
    with session.connected(plan.config.workers) if todo else contextlib.nullcontext():
        for place, run in enumerate(todo):
            _say(f"run {len(done) + 1} of {len(plan.runs)}, {run.name}{_left(todo[place:], done)}")
            done[run.name] = finetune(run.config, parent=parent)


def _table(plan: _Plan, done: Mapping[str, FinetuneResult]) -> Results:
    """The figures of all runs, over the utterances that every one of them tested."""
    corpus, folds, config = plan.corpus, plan.folds, plan.config
    heard = {run.name: dict(_predictions(done[run.name].predictions_csv)) for run in plan.runs}
    of_parts = [one.partition if folds.protocol == "official" else "" for one in corpus.utterances]
    places = {one.key: place for place, one in enumerate(corpus.utterances)}
    tested = sorted({places[key] for keys in heard.values() for key in keys})
    part = min(of_parts[row] for row in tested)
    judged = [row for row in tested if of_parts[row] == part]
    # A system that hears no audio does not miss what cannot be read.
    rows = [row for row in judged if all(corpus.utterances[row].key in keys for keys in heard.values())]
    keys, groups = [corpus.utterances[row].key for row in rows], [folds.groups[row] for row in rows]
    subject = Subject(
        corpus=corpus.name,
        protocol=folds.protocol,
        marks=tuple(marks(corpus, folds)),
        utterances=len(rows),
        speakers=len(set(groups)),
        part=part,
        left_out=len(judged) - len(rows),
    )
    first = heard[plan.runs[0].name]
    return results(
        subject,
        corpus.labels_UP[rows],
        groups,
        [first[key][0] for key in keys],
        {system: _guesses(plan, done, heard, system, keys) for system in config.systems},
        reference=config.reference,
        published=published(plan.kind),
        seed=config.protocol.seed,
    )


def _guesses(
    plan: _Plan,
    done: Mapping[str, FinetuneResult],
    heard: Mapping[str, Mapping[str, tuple[int, np.ndarray]]],
    system: str,
    keys: list[str],
) -> Guesses:
    runs = [run for run in plan.runs if run.config.system == system]
    recalls = [done[run.name].recall for run in runs]
    return Guesses(
        seeds=tuple(run.config.seed for run in runs),
        guess_SUP=np.stack([np.stack([heard[run.name][key][1] for key in keys]) for run in runs]),
        recalls=tuple(value for value in recalls if value is not None),
    )


def _predictions(text: str) -> Iterator[tuple[str, tuple[int, np.ndarray]]]:
    """The fold and guess_P [P] of each utterance by its key, from a predictions.csv."""
    for row in csv.DictReader(io.StringIO(text)):
        yield row["utterance"], (int(row["fold"]), np.array([float(row[f"{name}_hat"]) for name in PRIMITIVES]))


def _tags(plan: _Plan) -> dict[str, str]:
    return {
        "cpcscale.systems": ",".join(plan.config.systems),
        "cpcscale.corpus": plan.corpus.name,
        "cpcscale.protocol": plan.folds.protocol,
        "cpcscale.marks": ",".join(marks(plan.corpus, plan.folds)),
        "cpcscale.config_hash": configs.digest(plan.config),
        "cpcscale.corpus_hash": plan.corpus.digest,
    }


def _seconds(plan: _Plan, done: Mapping[str, FinetuneResult]) -> dict[str, float]:
    total = dict.fromkeys(plan.config.systems, 0.0)
    for run in plan.runs:
        total[run.config.system] += done[run.name].seconds
    return total


def _expected_s(run: _Run, done: Mapping[str, FinetuneResult]) -> float | None:
    known = [result.seconds for result in done.values() if result.system == run.config.system]
    return float(np.mean(known)) if known else None


def _left(todo: list[_Run], done: Mapping[str, FinetuneResult]) -> str:
    seconds = [_expected_s(run, done) for run in todo]
    known = [value for value in seconds if value is not None]
    return f"; about {duration(sum(known))} left" if len(known) == len(seconds) else ""


def _say(text: str) -> None:
    note(f"reproduce: {text}")
