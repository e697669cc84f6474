"""The workers of a pretraining on Ray Train: started, started again with who is left, and asked to stop."""

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
from cpcscale.cluster.mailbox import Mailbox, MessageDelivery
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.cluster.worker import run_worker
from cpcscale.errors import Terminated, UserError
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

    Raises the workers' UserError, and one when more of them died than may; KeyboardInterrupt at Ctrl-C; Terminated at
    SIGTERM, once they have made a checkpoint or `stop_grace_s` is over, and at once at a second one.
    """
    # Not where a node may be lost that the driver could do without.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    # A driver that was overtaken may be at work in its own still.
    ray_folder = storage.join(config.run_dir, f"{_RAY}{holder}")
    _remove_ray_folders(config.run_dir)
    workers = (config.least_workers, config.most_workers) if config.elastic else config.workers
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"config": config, "mailbox": mailbox, "fingerprint": fingerprint, "holder": holder},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, elastic_resize_monitor_interval_s=config.grow_every_s
        ),
        run_config=RunConfig(
            name="train",
            storage_path=ray_folder,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[_Deaths(mailbox, config.max_failures)],
        ),
    )
    console = Console(tracker, on_saved)
    stop = _Stop(mailbox, console, _grace_s(config, console))
    try:
        with stop.installed(), MessageDelivery(mailbox, console):
            trainer.fit()
    except (SystemExit, KeyboardInterrupt):
        # Ray Train answers Ctrl-C by exiting with status 0; for us it is an interrupted run like any other.
        raise (Terminated() if stop.asked else KeyboardInterrupt()) from None
    except ray.train.TrainingFailedError as failure:
        if error := ray.get(mailbox.run_end.remote()).error:
            raise UserError(error) from None
        failures = failure.worker_failures if isinstance(failure, ray.train.WorkerGroupError) else {}
        if not failures or any(_is_bug(error) for error in failures.values()):
            raise
        raise UserError(
            f"{_named(failures)}, past max_failures={config.max_failures}: out of memory (lower train.micro_batch or "
            "feed.prefetch), or a node that is gone; the same command goes on from the last checkpoint"
        ) from None
    finally:
        console.close()
        storage.remove(ray_folder)
    end = ray.get(mailbox.run_end.remote())
    if end.error:
        raise UserError(end.error)
    if end.summary is None:
        raise Terminated(end.stopped)
    return dict(end.summary)


def _grace_s(config: PretrainConfig, console: Console) -> float:
    """How long the workers have for a checkpoint at SIGTERM; the console says when Ray gives a job less."""
    if (wait_s := session.stop_wait_s()) < config.stop_grace_s:
        console.note(
            f"Ray kills this job {wait_s:g} s after it is asked to stop, and stop_grace_s={config.stop_grace_s:g}: for "
            "a checkpoint that takes longer, submit it with RAY_JOB_STOP_WAIT_TIME_S among its env_vars"
        )
    return min(config.stop_grace_s, wait_s)


class _Deaths(ray.train.UserCallback):
    """Says in the controller why the workers start again."""

    def __init__(self, mailbox: Any, left: int) -> None:
        self._mailbox, self._left = mailbox, left

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if any(isinstance(error, UserError) for error in worker_exceptions.values()):
            # It is not tried again.
            return
        # A node that was taken away as it was announced is not counted.
        announced = any(getattr(_gone(error), "preempted", False) for error in worker_exceptions.values())
        self._left -= not announced
        if announced or self._left != -1:
            self._mailbox.put.remote("note", f"{_named(worker_exceptions)}: starting again from the last checkpoint")


class _Stop:
    """What SIGTERM does while workers work: the first asks them for a checkpoint and to end, another one ends all."""

    def __init__(self, mailbox: Any, console: Console, grace_s: float) -> None:
        self._mailbox, self._console, self._grace_s = mailbox, console, grace_s
        self.asked = False
        self._abort = threading.Timer(grace_s, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        self._abort.daemon = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block; after it signals do what they did before."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            yield
        finally:
            self._abort.cancel()
            # Ray Train's own stays installed and would end the process at a later Ctrl-C, whatever runs then.
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or not self._console.working:
            # By Ray Train's handler, which ends the workers.
            signal.raise_signal(signal.SIGINT)
            return
        self._console.note(f"asked to stop (SIGTERM): making a checkpoint, {self._grace_s:g} s at most")
        self._mailbox.stop.remote()
        self._abort.start()


def _named(failures: Mapping[int, Exception]) -> str:
    """Which workers died; where those that are left noticed first, that one did."""
    dead = [rank for rank, error in failures.items() if not isinstance(error, PeerLostError) and not _is_bug(error)]
    if dead:
        return f"worker{'s' * (len(dead) > 1)} {', '.join(map(str, sorted(dead)))} died"
    bugs = [
        f"worker {rank} failed ({type(error).__name__}: {error})" for rank, error in failures.items() if _is_bug(error)
    ]
    return bugs[0] if bugs else "a worker died"


def _is_bug(error: Exception) -> bool:
    """Whether a worker failed of itself: neither its process nor that of another one is gone."""
    return not isinstance(_gone(error), ray.exceptions.RayActorError | PeerLostError)


def _gone(error: Exception) -> Exception:
    """What Ray knows of a worker that does not answer any more; any other error as it is."""
    return getattr(error, "health_check_failure", error)


def _remove_ray_folders(run_dir: str) -> None:
    """Removes what drivers that were killed have left of Ray Train's."""
    local = storage.local_path(run_dir)
    names = [path.name for path in local.iterdir()] if local else storage.list_files(run_dir)
    for name in {name.partition("/")[0] for name in names if name.startswith(_RAY)}:
        storage.remove(storage.join(run_dir, name))
