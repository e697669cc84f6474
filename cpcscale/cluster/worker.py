"""One worker of a pretraining: opens the data, runs the training loop, and passes requests to save or stop on to it."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from cpcscale import storage
from cpcscale.cluster import session
from cpcscale.cluster.pretrain_data import open_data
from cpcscale.errors import UserError
from cpcscale.train.loop import pretrain, thread_feed
from cpcscale.train.observer import Observer, RunRequests, StoppedError
from cpcscale.train.ranks import Ranks

if TYPE_CHECKING:
    from cpcscale.cluster.mailbox import MailboxObserver

_POLL_S = 0.5
# How long before a node is taken away the last checkpoint is made.
_BEFORE_S = 5.0


def run_worker(spec: dict[str, Any]) -> None:
    """Runs one worker. A UserError is reported to the driver, and the run is not restarted then."""
    import ray
    from ray.train.torch import get_device

    from cpcscale.cluster.feeders import actor_feed
    from cpcscale.cluster.mailbox import MailboxObserver

    config, mailbox = spec["config"], spec["mailbox"]
    if ray.get(mailbox.run_end.remote()).error:
        return
    storage.configure(config.storage)
    ranks = Ranks.current(get_device())
    make_feed = partial(actor_feed, config.storage) if config.feed.kind == "actors" else thread_feed
    observer, requests = MailboxObserver(mailbox), RunRequests()
    try:
        session.refuse_other_versions(*spec["versions"])
        data = open_data(config)
        if data.train.fingerprint != spec["fingerprint"]:
            raise UserError(
                f"the index at {data.train.base} has changed since this run was started: start the same command again "
                "to use the new version"
            )
        # Rank 0 passes requests on to the others with each step.
        watching = _pass_requests(mailbox, requests, observer) if ranks.first else contextlib.nullcontext()
        with watching, ranks.detect_lost_peers():
            summary = pretrain(config, data, config.run_dir, ranks, observer, make_feed, spec["holder"], requests)
    except UserError as failure:
        ray.get(mailbox.fail.remote(str(failure)))
        raise
    except StoppedError as stopped:
        ray.get(mailbox.stopped.remote(str(stopped)))
        return
    if ranks.first:
        ray.get(mailbox.finish.remote(summary))


@contextlib.contextmanager
def _pass_requests(mailbox: Any, requests: RunRequests, observer: MailboxObserver) -> Iterator[None]:
    """For the block, a thread requests a stop when the driver asks for it, and saves when a node will be taken away."""
    import ray

    ended, preemption = threading.Event(), _preemption(observer)

    def listen() -> None:
        known, again_s, mailbox_id = None, math.inf, ""
        while not ended.wait(_POLL_S):
            stop, now = ray.get(mailbox.stopping.remote())
            if stop:
                requests.stop()
                return
            if now != mailbox_id:
                mailbox_id = now
                observer.send_again()
            info = preemption()
            if info and info != known:
                known = info
                # A second checkpoint just before the deadline, so that the steps until then are not lost.
                again_s = (info.deadline_ms or math.inf) / 1000 - _BEFORE_S
                again_s = again_s if again_s > time.time() + _BEFORE_S else math.inf
                requests.save()
                observer.note("a node will be taken away: making a checkpoint, and going on until then")
            elif time.time() >= again_s:
                again_s = math.inf
                requests.save()

    def quietly() -> None:
        try:
            listen()
        except ray.exceptions.RayError:
            # The driver's mailbox is gone, and this worker will end too.
            return

    threading.Thread(target=quietly, name="listen", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _preemption(observer: Observer) -> Callable[[], Any]:
    """Returns a function that gives this worker's ray.train.PreemptionInfo, None while no node will be taken away.

    ray.train.get_preemption_info() cannot be used: it goes through a barrier of all workers in one actor that takes
    1,000 calls at a time, so with more workers it would wait for ever.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        context = get_train_context().preemption_context
    except (ImportError, AttributeError):
        observer.note(
            "this version of Ray does not announce that a node will be taken away: no checkpoint is made before that"
        )
        return lambda: None
    return lambda: context.preemption_info
