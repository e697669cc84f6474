"""`pretrain` and what is asked about runs and machines: `checkpoint`, `size`, `bench`, `doctor`."""

from __future__ import annotations

import argparse
import dataclasses

from cpcscale.errors import UserError
from cpcscale.machine import usable_cores
from cpcscale.verbs.printed import emit, refuse_settings, show


def pretrain(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.cluster.pretrain_config import PretrainConfig
    from cpcscale.experiments.pretrain import pretrain
    from cpcscale.report.terminal.pretrain import pretrain_lines

    summary = pretrain(config.load(PretrainConfig, options.config, options.overrides), take_over=options.take_over)
    show(options, summary, pretrain_lines(summary))


def checkpoint(options: argparse.Namespace) -> int:
    from cpcscale.report.terminal import checkpoints as report
    from cpcscale.runs import inspect

    if options.what == "acoustics":
        from cpcscale import config
        from cpcscale.experiments.acoustics import AcousticsConfig, acoustics

        values = acoustics(options.path, config.load(AcousticsConfig, None, options.overrides))
        show(options, values, report.acoustics_lines(values))
        return 0
    refuse_settings(options, f"checkpoint {options.what}")
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
    show(options, values, lines)
    return 0 if values.get("ok", True) else 1


def size(options: argparse.Namespace) -> None:
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
    show(options, found, size_lines(found, given.names))


def bench(options: argparse.Namespace) -> None:
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
    show(options, result, lines)


def doctor(options: argparse.Namespace) -> int:
    from cpcscale import doctor

    findings = []
    for finding in doctor.examine(doctor.load(options.config, options.overrides)):
        findings.append(finding)
        if not options.json:
            print(f"{'ok' if finding.ok else 'NO':4} {finding.name:10} {finding.text}", flush=True)
    if options.json:
        emit({finding.name: dataclasses.asdict(finding) for finding in findings})
    return 0 if all(finding.ok for finding in findings) else 1
