"""`corpus`, `finetune`, and what is done with the recogniser that it makes: `recogniser`, `predict`."""

from __future__ import annotations

import argparse
import dataclasses
import re
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

    refuse_settings(options, f"recogniser {options.what}")
    if options.what == "show":
        values = describe_recogniser(options.path)
        show(options, values, show_lines(values))
        return 0
    values = verify_recogniser(options.path)
    show(options, values, verify_lines(values))
    return 0 if values["ok"] else 1


def predict(options: argparse.Namespace) -> int:
    from cpcscale.cluster import session
    from cpcscale.cluster.tasks import cpus_each, stream_tasks
    from cpcscale.serve.predict import Asked, Draw, predict_files

    draw: Draw | None = None
    if options.plot:
        # matplotlib takes a second to import.
        from cpcscale.report.plots.prediction import draw_predictions

        draw = draw_predictions
    workers = options.workers
    if workers < 0:
        raise UserError(f"--workers {workers} is no number of workers: give 1 or more")
    run = None
    if workers > 1 or session.uses_ray():
        run = partial(stream_tasks, cpus=cpus_each(workers) if workers else 1)
    done = predict_files(
        options.model,
        options.audio,
        options.out,
        asked=Asked(_seconds(options.segments), options.plot, draw),
        run=run,
        force=options.force,
        as_json=options.json,
    )
    if options.out and options.json:
        emit({"out": options.out, **dataclasses.asdict(done)})
    return 1 if done.without_value else 0


def _seconds(text: str) -> float | None:
    """`10s`, `2.5s` and `500ms` in seconds; None for an empty text. Raises UserError for anything else."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(ms|s)", text, re.ASCII)
    if not found:
        raise UserError(f"--segments {text} is no duration: write seconds or milliseconds, as 10s, 2.5s or 500ms")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)
