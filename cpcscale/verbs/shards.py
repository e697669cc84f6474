"""`pack`, `index`, `audit`: audio files and tars to shard sets."""

from __future__ import annotations

import argparse
import sys

from cpcscale.errors import UserError
from cpcscale.verbs.printed import emit, show


def pack(options: argparse.Namespace) -> None:
    from cpcscale import config
    from cpcscale.cluster.tasks import stream_tasks
    from cpcscale.report.terminal.sets import pack_lines, pack_values
    from cpcscale.shards.pack import PackConfig, pack

    packed = pack(options.source, options.target, config.load(PackConfig, None, options.overrides), stream_tasks)
    values = pack_values(packed)
    if options.json:
        emit({"target": options.target, **values})
        return
    print(f"packed {options.source} into {options.target}")
    print("\n".join(pack_lines(values, options.target)))


def index(options: argparse.Namespace) -> None:
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
    show(options, values, index_lines(values))


def audit(options: argparse.Namespace) -> int:
    from cpcscale import config
    from cpcscale.cluster.audit import AuditConfig, audit
    from cpcscale.report.terminal.sets import audit_lines

    values = audit(options.shards, config.load(AuditConfig, None, options.overrides))
    show(options, values, audit_lines(values))
    if options.plot:
        from cpcscale.report.plots.audit import write_plot

        write_plot(values, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0 if values["ok"] else 1
