"""`corpus`, `finetune`, and what is done with what it makes: `recogniser`, `register`, `predict`, `features`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Iterator
from functools import partial

from cpcscale.errors import UserError
from cpcscale.verbs.printed import emit, refuse_settings, show


def corpus(options: argparse.Namespace) -> None:
    from cpcscale import config, storage
    from cpcscale.emotion.corpora import open_corpus
    from cpcscale.emotion.corpora.corpus import CorpusConfig
    from cpcscale.emotion.scores.describe import describe
    from cpcscale.report.terminal.corpus import corpus_lines

    # In a run these keys are corpus.kind=... and so on, as error messages show them: both spellings are taken.
    path = options.path.removeprefix("corpus.path=")
    settings = config.load(CorpusConfig, None, [text.removeprefix("corpus.") for text in options.overrides])
    if settings.path:
        raise UserError(f"path={settings.path} and {path} are both given: `corpus {options.what}` takes one path")
    values = describe(open_corpus(dataclasses.replace(settings, path=path)), storage.absolute(path))
    show(options, values, corpus_lines(values))


def finetune(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.experiments.finetune import FinetuneConfig, finetune
    from cpcscale.report.terminal.finetune import finetune_lines

    settings = config.load(FinetuneConfig, options.config, options.overrides)
    result = finetune(settings).as_dict()
    if options.json:
        emit(result)
        return
    print("\n".join(finetune_lines(result)))
    print(f"written to {settings.run_dir}; run {result['run_id'][:8]} of `cpcscale compare`")


def recogniser(options: argparse.Namespace) -> int:
    from cpcscale.report.terminal.recogniser import show_lines, verify_lines
    from cpcscale.serve.folder import describe_recogniser, verify_recogniser
    from cpcscale.tracking.registry import opened

    if options.what == "fit":
        return _fit(options)
    refuse_settings(options, f"recogniser {options.what}")
    with opened(options.path) as folder:
        if options.what == "show":
            values = describe_recogniser(folder)
            show(options, values, show_lines(values))
            return 0
        values = verify_recogniser(folder)
        show(options, values, verify_lines(values))
        return 0 if values["ok"] else 1


def register(options: argparse.Namespace) -> None:
    from cpcscale.experiments.published import register_model

    refuse_settings(options, "register")
    values = register_model(
        options.model,
        options.name,
        options.alias,
        share_training_rows=options.share_training_rows,
        accept_licence=options.accept_licence,
        force=options.force,
    )
    address = f"{values['name']}@{values['alias']}" if values["alias"] else f"{values['name']}/{values['version']}"
    before = f", before it version {values['before']}" if values["before"] not in (None, values["version"]) else ""
    show(options, values, [f"models:/{address} is version {values['version']}{before}"])


def _fit(options: argparse.Namespace) -> int:
    from cpcscale import config, storage
    from cpcscale.experiments.finetune import FinetuneConfig, finetune, recogniser_url
    from cpcscale.report.terminal.recogniser import show_lines
    from cpcscale.serve.folder import copy_recogniser, describe_recogniser, is_free_for

    outs = [text.removeprefix("out=") for text in options.overrides if text.startswith("out=")]
    if len(outs) != 1 or not outs[0]:
        raise UserError("`recogniser fit CONFIG` needs one out=FOLDER, where the recogniser is to be")
    overrides = [text for text in options.overrides if not text.startswith("out=")]
    settings = config.load(FinetuneConfig, options.path, overrides)
    if settings.publish == "none":
        settings = config.load(FinetuneConfig, options.path, [*overrides, "publish=final"])
    out, made = storage.absolute(outs[0]), recogniser_url(storage.absolute(settings.run_dir))
    # Before hours of fitting.
    is_free_for(out, made)
    finetune(settings)
    copy_recogniser(made, out)
    values = describe_recogniser(out)
    show(options, values, show_lines(values))
    return 0


def predict(options: argparse.Namespace) -> int:
    from cpcscale.cluster import session
    from cpcscale.cluster.tasks import cpus_each, gpus_each, stream_tasks
    from cpcscale.serve.predict import Asked, Draw, predict_files
    from cpcscale.tracking.registry import opened

    draw: Draw | None = None
    if options.plot:
        # matplotlib takes a second to import.
        from cpcscale.report.plots.prediction import draw_predictions

        draw = draw_predictions
    workers = options.workers
    if workers < 0:
        raise UserError(f"--workers {workers} is no number of workers: give 1 or more")
    run = run_parts = None
    if workers > 1 or session.uses_ray():
        gpus = gpus_each(workers) if options.device == "cuda" else 0
        cpus = cpus_each(workers) if workers else 1
        run = partial(stream_tasks, cpus=cpus)
        run_parts = partial(stream_tasks, cpus=min(1, cpus), gpus=gpus, most_processes=workers) if gpus else None
    asked = Asked(_seconds(options.segments), options.strict, options.plot, draw, options.device)
    with opened(options.model) as model:
        done = predict_files(
            *(model, options.audio, options.out),
            asked=asked,
            run=run,
            run_parts=run_parts,
            # The file of a model of MLflow may be on this machine alone.
            send=session.joins_cluster() and model != options.model,
            hold=_held,
            force=options.force,
            as_json=options.json,
        )
    if options.out and options.json:
        emit({"out": options.out, **dataclasses.asdict(done)})
    return 1 if done.without_value else 0


@contextlib.contextmanager
def _held(out: str) -> Iterator[None]:
    """Keeps an output to this process. Raises UserError while another one that is alive makes it."""
    from cpcscale import storage
    from cpcscale.progress import note
    from cpcscale.runs.lease import HeldError, LeaseConfig, hold
    from cpcscale.runs.ledger import Ledger

    place = f"{out}.lease"
    lease = None
    try:
        with hold(place, LeaseConfig(), take_over=False, say=note) as lease:
            yield
    except HeldError:
        holder = Ledger(place).head().holder
        by = f"another process, {holder.described()}" if holder else "another process"
        raise UserError(f"{out} is being made by {by}: wait for it, or give --out another name") from None
    finally:
        if lease and not lease.lost:
            # The output is there: what could not be removed is in nobody's way.
            with contextlib.suppress(UserError):
                storage.remove(place)


def features(options: argparse.Namespace) -> int:
    from cpcscale.serve.features import write_features
    from cpcscale.tracking.registry import opened

    with opened(options.model) as model:
        return write_features(model, options.audio, options.out, layer=options.layer, force=options.force)


def _seconds(text: str) -> float | None:
    """`10s`, `2.5s` and `500ms` in seconds; None for an empty text. Raises UserError for anything else."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(ms|s)", text, re.ASCII)
    if not found:
        raise UserError(f"--segments {text} is no duration: write seconds or milliseconds, as 10s, 2.5s or 500ms")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)
