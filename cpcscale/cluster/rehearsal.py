"""Runs a short function on real Ray Train workers of a local Ray, for measurements under a run's conditions.

Ray's other processes run too: with few cores they slow an update down by a fifth.
"""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from cpcscale.cluster import session
from cpcscale.errors import UserError
from cpcscale.signals import handlers_restored
from cpcscale.train.ranks import Ranks


def run_on_workers(work: Callable[[Ranks], dict[str, float]], workers: int, use_gpu: bool) -> dict[str, float]:
    """Runs `work` on `workers` workers and returns what rank 0 returned.

    Uses a local Ray, not a cluster, unless this process has already joined one. Raises the workers' UserError, and
    KeyboardInterrupt at Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="cpcscale-ray-") as folder, session.connected(workers, here=True):
        out = Path(folder, "result.json")
        trainer = TorchTrainer(
            _write,
            train_loop_config={"work": work, "out": str(out)},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
            run_config=RunConfig(name="rehearsal", storage_path=folder),
        )
        try:
            # Ray Train's handler would end the process with status 0 at a later Ctrl-C.
            with handlers_restored(signal.SIGINT):
                trainer.fit()
        except SystemExit:
            # Ray Train handles Ctrl-C by exiting with status 0.
            raise KeyboardInterrupt from None
        except ray.train.WorkerGroupError as failure:
            for error in failure.worker_failures.values():
                if isinstance(error, UserError):
                    raise UserError(str(error)) from None
            raise
        return dict(json.loads(out.read_text()))


def _write(spec: dict[str, Any]) -> None:
    ranks = Ranks.current(get_device())
    found = spec["work"](ranks)
    if ranks.first:
        # Through a file: Ray Train returns reported values only together with a checkpoint.
        Path(spec["out"]).write_text(json.dumps(found))
