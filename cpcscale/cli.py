"""`cpcscale VERB CONFIG [key=value ...]`: results go to stdout, progress and errors to stderr.

A mistake of the user ends with one line and exit status 2; a traceback means a bug. A verb imports what it needs when
it runs, so that `--help` and a mistyped config answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from cpcscale import freed_memory, stdout
from cpcscale.arguments import command_line
from cpcscale.cluster import ray_loss
from cpcscale.errors import Terminated, UserError
from cpcscale.machine import check_surroundings, usable_cores
from cpcscale.signals import ENDING, handlers_restored

_GOES_ON = {
    "pack": "goes on where it was",
    "pretrain": "goes on from the last checkpoint",
    "sweep": "goes on with the trials that are left",
    "reproduce": "goes on with the runs that are left",
    "evaluate": "goes on with the runs that are left",
}


@stdout.guarded
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status."""
    parser = command_line()
    options, rest = parser.parse_known_args(arguments)
    # argparse returns overrides that follow a flag in `rest`.
    if any(text.startswith("-") or "=" not in text for text in rest):
        parser.error(f"{options.verb} does not take {' '.join(rest)}; overrides of config keys are written key=value")
    options.overrides = [*options.overrides, *rest]
    # These run without a config: a first argument with a `=` is then an override, unless it is a file.
    first = options.config if options.verb in ("bench", "reproduce", "doctor") else None
    if first and "=" in first and not Path(first).is_file():
        options.config, options.overrides = None, [options.config, *options.overrides]
    freed_memory.keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="cpcscale: %(message)s", stream=sys.stderr)
    if options.ray:
        # Set and empty is unset, as everywhere.
        os.environ["RAY_ADDRESS"] = os.environ.get("RAY_ADDRESS") or "local"
    goes_on = f"the same command {_GOES_ON.get(options.verb, 'begins again')}"
    try:
        check_surroundings()
        with handlers_restored(*ENDING, meanwhile=_terminate), ray_loss.guarded(goes_on):
            return VERBS[options.verb](options) or 0
    except UserError as error:
        print(f"cpcscale: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "cpcscale":
            raise
        way_out = "run it with the Python of your install; for a job: `ray job submit ... -- /PATH/TO/python ...`"
        print(f"cpcscale: error: {sys.executable} has no package {error.name}: {way_out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"cpcscale: {str(stopped) or 'stopped'}; {goes_on}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Raises Terminated, so that the signals of ENDING close what is open, as Ctrl-C does."""
    raise Terminated


def _pack(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.cluster.tasks import stream_tasks
    from cpcscale.report.terminal.sets import pack_lines, pack_values
    from cpcscale.shards.pack import PackConfig, pack

    packed = pack(options.source, options.target, config.load(PackConfig, None, options.overrides), stream_tasks)
    values = pack_values(packed)
    if options.json:
        _emit({"target": options.target, **values})
        return
    print(f"packed {options.source} into {options.target}")
    print("\n".join(pack_lines(values, options.target)))


def _index(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.cluster.tasks import stream_tasks
    from cpcscale.report.terminal.sets import index_lines, index_values
    from cpcscale.shards.adoption.adopt import adopt, exclude_from
    from cpcscale.shards.adoption.read_tar import IndexConfig

    spec = config.load(IndexConfig, None, options.overrides)
    if options.exclude and (options.append or options.overrides):
        raise UserError(
            "--exclude only removes utterances from an index: give it without --append and without settings"
        )
    adopted = (
        exclude_from(options.shards, options.exclude)
        if options.exclude
        else adopt(options.shards, spec, append=options.append, run=stream_tasks)
    )
    values = index_values(adopted)
    _show(options, values, index_lines(values))


def _audit(options: argparse.Namespace) -> int:
    from cpcscale import config
    from cpcscale.cluster.audit import AuditConfig, audit
    from cpcscale.report.terminal.sets import audit_lines

    values = audit(options.shards, config.load(AuditConfig, None, options.overrides))
    _show(options, values, audit_lines(values))
    if options.plot:
        from cpcscale.report.plots.audit import write_plot

        write_plot(values, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0 if values["ok"] else 1


def _pretrain(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.cluster.pretrain_config import PretrainConfig
    from cpcscale.experiments.pretrain import pretrain
    from cpcscale.report.terminal.pretrain import pretrain_lines

    summary = pretrain(config.load(PretrainConfig, options.config, options.overrides), take_over=options.take_over)
    _show(options, summary, pretrain_lines(summary))


def _checkpoint(options: argparse.Namespace) -> int:
    from cpcscale.report.terminal import checkpoints as report
    from cpcscale.runs import inspect

    _refuse_settings(options, f"checkpoint {options.what}")
    match options.what:
        case "ls":
            values = inspect.list_checkpoints(options.path)
            lines = report.list_lines(values)
        case "show":
            values = inspect.describe_checkpoint(options.path)
            lines = report.show_lines(values)
        case _:
            values = inspect.verify_checkpoints(options.path)
            lines = report.verify_lines(values)
    _show(options, values, lines)
    return 0 if values.get("ok", True) else 1


def _corpus(options: argparse.Namespace) -> None:
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
    _show(options, values, corpus_lines(values))


def _finetune(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.experiments.finetune import FinetuneConfig, finetune
    from cpcscale.report.terminal.finetune import finetune_lines

    settings = config.load(FinetuneConfig, options.config, options.overrides)
    result = finetune(settings).as_dict()
    if options.json:
        _emit(result)
        return
    print("\n".join(finetune_lines(result)))
    print(f"written to {settings.run_dir}; run {result['run_id'][:8]} of `cpcscale compare`")


def _recogniser(options: argparse.Namespace) -> int:
    from cpcscale.report.terminal.recogniser import show_lines, verify_lines
    from cpcscale.serve.folder import describe_recogniser, verify_recogniser

    _refuse_settings(options, f"recogniser {options.what}")
    if options.what == "show":
        values = describe_recogniser(options.path)
        _show(options, values, show_lines(values))
        return 0
    values = verify_recogniser(options.path)
    _show(options, values, verify_lines(values))
    return 0 if values["ok"] else 1


def _predict(options: argparse.Namespace) -> int:
    from cpcscale.serve.predict import predict_files

    return predict_files(options.model, options.audio, options.out, as_json=options.json)


def _sweep(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.experiments.sweep.run import SweepConfig, sweep

    settings = config.load(SweepConfig, options.config, options.overrides)
    result = sweep(settings, resume=options.resume)
    if options.json:
        _emit(result)
        return
    print(f"best of {result['trials']} trials: inner_ccc {result['inner_ccc']:.3f}, on development speakers alone")
    for key, value in result["best"].items():
        print(f"  {key}={value}")
    print(f"its config: {settings.run_dir}/best.yaml; run {result['run_id'][:8]} of `cpcscale compare`")


def _reproduce(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.experiments.many_runs_config import ReproduceConfig
    from cpcscale.experiments.reproduce.run import reproduce
    from cpcscale.report.terminal.results import results_lines

    overrides = [*options.overrides, *(["dry_run=true"] if options.dry_run else [])]
    _show_table(options, reproduce(config.load(ReproduceConfig, options.config, overrides)), results_lines)


def _evaluate(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.experiments.evaluate.config import EvaluateConfig
    from cpcscale.experiments.evaluate.run import evaluate
    from cpcscale.report.terminal.evaluate import evaluate_lines

    overrides = [*options.overrides, *(["dry_run=true"] if options.dry_run else [])]
    _show_table(options, evaluate(config.load(EvaluateConfig, options.config, overrides)), evaluate_lines)


def _show_table(
    options: argparse.Namespace, result: dict[str, Any], lines: Callable[[Mapping[str, Any]], list[str]]
) -> None:
    """Prints the table of many runs by `lines`, or for a dry run the list of runs."""
    from cpcscale.report.terminal.results import run_lines

    _show(options, result, run_lines(result) if result.get("dry_run") else lines(result))


def _compare(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.report import compare
    from cpcscale.tracking.runs import read_runs
    from cpcscale.tracking.store import TrackingConfig

    tracking = config.load(TrackingConfig, None, options.overrides)
    runs = read_runs(tracking)
    rows = compare.compare_rows(runs)
    match options.format:
        case "json":
            print(compare.format_json(rows))
        case "csv":
            print(compare.format_csv(rows), end="")
        case _:
            print(compare.format_table(rows))
    if options.html:
        from cpcscale.report.html.compare_page import write_html

        write_html(runs, options.html)
        print(f"page: {options.html}", file=sys.stderr)


def _bench(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.report.terminal import bench as report

    if options.profile and options.what != "train":
        raise UserError(f"--profile is only for `bench train`, not for `bench {options.what}`: leave it out")
    if options.peers and options.what != "feed":
        raise UserError(f"--peers is only for `bench feed`, not for `bench {options.what}`: leave it out")
    if options.what == "plan":
        if options.config or options.overrides:
            raise UserError("`bench plan` takes no config: give --shards, --lanes and --rows")
        from cpcscale.bench.order_at_scale import bench_plan

        result = bench_plan(options.shards, options.lanes, options.rows)
        lines = report.plan_lines(result)
    elif options.what == "train":
        from cpcscale.bench.train import TrainBenchConfig, bench_train

        result = bench_train(config.load(TrainBenchConfig, options.config, options.overrides), options.profile)
        lines = report.train_lines(result)
    elif options.what == "scale":
        from cpcscale.bench.scale import ScaleBenchConfig, bench_scale
        from cpcscale.report.terminal.scale import scale_lines

        result = bench_scale(config.load(ScaleBenchConfig, options.config, options.overrides))
        lines = scale_lines(result)
    else:
        from cpcscale.bench.feed import FeedBenchConfig, bench_feed

        spec = config.load(FeedBenchConfig, options.config, options.overrides)
        result = bench_feed(spec, options.peers)
        lines = report.feed_lines(result)
    _show(options, result, lines)


def _size(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.cluster.pretrain_config import PretrainConfig
    from cpcscale.report.terminal.size import size_lines
    from cpcscale.size.machines import Machines
    from cpcscale.size.plan import run_size
    from cpcscale.size.rates import Rates

    machines = Machines(
        options.nodes,
        options.gpus_per_node,
        options.cores_per_node or usable_cores(),
        options.store_mb_s,
        options.network_gbit_s,
    )
    given = Rates(options.update_rate, options.decode_rate)
    spec = config.load(PretrainConfig, options.config, options.overrides)
    found = dataclasses.asdict(run_size(spec, machines, given))
    _show(options, found, size_lines(found, given.names))


def _doctor(options: argparse.Namespace) -> int:
    from cpcscale import doctor

    findings = []
    for finding in doctor.examine(doctor.load(options.config, options.overrides)):
        findings.append(finding)
        if not options.json:
            print(f"{'ok' if finding.ok else 'NO':4} {finding.name:10} {finding.text}", flush=True)
    if options.json:
        _emit({finding.name: dataclasses.asdict(finding) for finding in findings})
    return 0 if all(finding.ok for finding in findings) else 1


def _refuse_settings(options: argparse.Namespace, verb: str) -> None:
    if options.overrides:
        raise UserError(f"`{verb}` takes a path and no settings such as {options.overrides[0]}")


def _show(options: argparse.Namespace, result: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Prints the result as one JSON object, or as lines for a person."""
    if options.json:
        _emit(result)
    else:
        print("\n".join(lines))


def _emit(result: Mapping[str, Any]) -> None:
    print(json.dumps(result))


VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "pack": _pack,
    "index": _index,
    "audit": _audit,
    "pretrain": _pretrain,
    "size": _size,
    "checkpoint": _checkpoint,
    "corpus": _corpus,
    "finetune": _finetune,
    "recogniser": _recogniser,
    "predict": _predict,
    "sweep": _sweep,
    "reproduce": _reproduce,
    "evaluate": _evaluate,
    "compare": _compare,
    "bench": _bench,
    "doctor": _doctor,
}
