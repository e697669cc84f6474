"""`sweep`, `reproduce`, `evaluate`, `compare`: many runs, and their tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from cpcscale.verbs.printed import emit, show


def sweep(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.experiments.sweep.run import SweepConfig, sweep

    settings = config.load(SweepConfig, options.config, options.overrides)
    result = sweep(settings, resume=options.resume)
    if options.json:
        emit(result)
        return
    print(f"best of {result['trials']} trials: inner_ccc {result['inner_ccc']:.3f}, on development speakers alone")
    for key, value in result["best"].items():
        print(f"  {key}={value}")
    print(f"its config: {settings.run_dir}/best.yaml; run {result['run_id'][:8]} of `cpcscale compare`")


def reproduce(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.experiments.many_runs_config import ReproduceConfig
    from cpcscale.experiments.reproduce.run import reproduce
    from cpcscale.report.terminal.results import results_lines

    overrides = [*options.overrides, *(["dry_run=true"] if options.dry_run else [])]
    _show_table(options, reproduce(config.load(ReproduceConfig, options.config, overrides)), results_lines)


def evaluate(options: argparse.Namespace) -> None:
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

    show(options, result, run_lines(result) if result.get("dry_run") else lines(result))


def compare(options: argparse.Namespace) -> None:
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
