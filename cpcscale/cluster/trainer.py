"""Runs the workers of a pretraining on Ray Train: starts them, restarts them after failures, and stops them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.cluster.console import Console
from cpcscale.cluster.mailbox import Mailbox, MessageDelivery, RunEnd
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.cluster.ray_loss import RayLostError
from cpcscale.cluster.worker import run_worker
from cpcscale.errors import Terminated, UserError, optional
from cpcscale.signals import ENDING, handlers_restored
from cpcscale.tracking.tracker import Tracker
from cpcscale.train.ranks import PeerLostError

_RAY = "ray-"


def fit(
    config: PretrainConfig,
    fingerprint: str,
    use_gpu: bool,
    tracker: Tracker,
    holder: str,
    on_saved: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Trains on as many workers as the config asks for and returns the loop's summary; `on_saved` as in Console.

    Raises the workers' UserError; UserError after more than `max_failures` failures; KeyboardInterrupt at Ctrl-C; and
    Terminated at a signal of ENDING, once the workers have made a checkpoint or `stop_grace_s` is over, or at a second
    one.
    """
    # On the driver's own node, so that losing another node never loses the mailbox.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(Mailbox)
    mailbox = actor.remote()
    # A folder for each driver: one that was overtaken may still be using its own.
    ray_folder = storage.join(config.run_dir, f"{_RAY}{holder}")
    _remove_ray_folders(config.run_dir)
    workers = (config.least_workers, config.most_workers) if config.elastic else config.workers
    spec = {"config": config, "mailbox": mailbox, "fingerprint": fingerprint, "holder": holder}
    spec["versions"] = tuple(session.versions().items())
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=spec,
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, elastic_resize_monitor_interval_s=config.grow_every_s
        ),
        run_config=RunConfig(
            name="train",
            storage_path=ray_folder,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[_RestartNotes(mailbox, config.max_failures)],
        ),
    )
    console = Console(tracker, on_saved)
    stop, delivery = _Stop(mailbox, console, _grace_s(config, console)), MessageDelivery(mailbox, console)
    try:
        with stop.installed(), delivery:
            trainer.fit()
    except (SystemExit, KeyboardInterrupt):
        # Ray Train handles Ctrl-C by exiting with status 0; here it is an interrupted run.
        raise (Terminated() if stop.asked else KeyboardInterrupt()) from None
    except ray.train.TrainingFailedError as failure:
        if delivery.end.error:
            raise UserError(delivery.end.error) from None
        failures = failure.worker_failures if isinstance(failure, ray.train.WorkerGroupError) else {}
        if not failures or any(_is_bug(error) for error in failures.values()):
            raise
        raise UserError(
            f"{_describe_failures(failures)}, past max_failures={config.max_failures}: out of memory (lower "
            "train.micro_batch or feed.prefetch), or a lost node; the same command goes on from the last checkpoint"
        ) from None
    finally:
        console.close()
        with optional(f"{ray_folder} cannot be removed", "the next start removes it"):
            storage.remove(ray_folder)
    return _summary(delivery.end)


def _summary(end: RunEnd) -> dict[str, Any]:
    if end.error:
        raise UserError(end.error)
    if end.stopped:
        raise Terminated(end.stopped)
    if end.summary is None:
        raise RayLostError("Ray's actor with the run's result died: the same command gives it from the checkpoint")
    return dict(end.summary)


def _grace_s(config: PretrainConfig, console: Console) -> float:
    """Seconds that the workers have for a checkpoint at SIGTERM; notes on the console if Ray kills the job earlier."""
    if (wait_s := session.stop_wait_s()) < config.stop_grace_s:
        console.note(
            f"Ray kills this job {wait_s:g} s after it is asked to stop, and stop_grace_s={config.stop_grace_s:g}: for "
            "a checkpoint that takes longer, submit it with RAY_JOB_STOP_WAIT_TIME_S among its env_vars"
        )
    return min(config.stop_grace_s, wait_s)


class _RestartNotes(ray.train.UserCallback):
    """Sends a note, from Ray Train's controller, about why the workers start again."""

    def __init__(self, mailbox: Any, left: int) -> None:
        self._mailbox, self._left = mailbox, left

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if any(isinstance(error, UserError) for error in worker_exceptions.values()):
            # A UserError ends the run.
            return
        # A node that was taken away after an announcement does not count as a failure.
        announced = any(getattr(_cause(error), "preempted", False) for error in worker_exceptions.values())
        self._left -= not announced
        if announced or self._left != -1:
            self._mailbox.put.remote(
                "note", f"{_describe_failures(worker_exceptions)}: starting again from the last checkpoint"
            )


class _Stop:
    """Handles the signals of ENDING: the first asks the workers for a checkpoint and to stop, a second ends them."""

    def __init__(self, mailbox: Any, console: Console, grace_s: float) -> None:
        self._mailbox, self._console, self._grace_s = mailbox, console, grace_s
        self.asked = False
        self._abort = threading.Timer(grace_s, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        self._abort.daemon = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles them in the block, and restores their handlers and that of SIGINT after it."""
        # Ray Train's handler of SIGINT would end the process at a later Ctrl-C, whatever runs then.
        with handlers_restored(signal.SIGINT), handlers_restored(*ENDING, meanwhile=self._on_signal):
            try:
                yield
            finally:
                self._abort.cancel()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or not self._console.working:
            # Ray Train's handler of SIGINT ends the workers.
            signal.raise_signal(signal.SIGINT)
            return
        asked = f"asked to stop ({signal.Signals(number).name})"
        self._console.note(f"{asked}: making a checkpoint, {self._grace_s:g} s at most")
        self._mailbox.stop.remote()
        self._abort.start()


def _describe_failures(failures: Mapping[int, Exception]) -> str:
    """A phrase that says which workers died; without ranks if only the others' errors are known."""
    dead = [rank for rank, error in failures.items() if not isinstance(error, PeerLostError) and not _is_bug(error)]
    if dead:
        return f"worker{'s' * (len(dead) > 1)} {', '.join(map(str, sorted(dead)))} died"
    bugs = [
        f"worker {rank} failed ({type(error).__name__}: {error})" for rank, error in failures.items() if _is_bug(error)
    ]
    return bugs[0] if bugs else "a worker died"


def _is_bug(error: Exception) -> bool:
    """Whether a worker failed on its own: neither its process nor that of another worker is gone."""
    return not isinstance(_cause(error), ray.exceptions.RayActorError | PeerLostError)


def _cause(error: Exception) -> Exception:
    """The underlying error of a worker that no longer answers; any other error as it is."""
    return getattr(error, "health_check_failure", error)


def _remove_ray_folders(run_dir: str) -> None:
    """Removes the Ray Train folders that killed drivers have left behind."""
    local = storage.local_path(run_dir)
    names = [path.name for path in local.iterdir()] if local else storage.list_files(run_dir)
    for name in {name.partition("/")[0] for name in names if name.startswith(_RAY)}:
        storage.remove(storage.join(run_dir, name))
