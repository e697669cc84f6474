"""`cpcscale VERB CONFIG [key=value ...]`: results go to stdout, progress and errors to stderr.

A mistake of the user ends with one line and exit status 2; a traceback means a bug. What a verb does is in verbs/; it
imports what it needs when it runs, so that `--help` and a mistyped config answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from cpcscale import freed_memory, stdout
from cpcscale.arguments import command_line
from cpcscale.cluster import ray_loss
from cpcscale.errors import Terminated, UserError
from cpcscale.machine import check_surroundings
from cpcscale.signals import ENDING, handlers_restored
from cpcscale.verbs import figures, recognisers, runs, shards

_GOES_ON = {
    "pack": "goes on where it was",
    "pretrain": "goes on from the last checkpoint",
    "sweep": "goes on with the trials that are left",
    "reproduce": "goes on with the runs that are left",
    "evaluate": "goes on with the runs that are left",
    "predict": "goes on with the parts that are left, if it has an --out",
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


VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "pack": shards.pack,
    "index": shards.index,
    "audit": shards.audit,
    "pretrain": runs.pretrain,
    "size": runs.size,
    "checkpoint": runs.checkpoint,
    "corpus": recognisers.corpus,
    "finetune": recognisers.finetune,
    "recogniser": recognisers.recogniser,
    "register": recognisers.register,
    "predict": recognisers.predict,
    "features": recognisers.features,
    "sweep": figures.sweep,
    "reproduce": figures.reproduce,
    "evaluate": figures.evaluate,
    "compare": figures.compare,
    "bench": runs.bench,
    "doctor": runs.doctor,
}
