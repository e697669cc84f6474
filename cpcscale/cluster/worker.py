"""What one worker of a pretraining does: its ranks, its data, the loop, and an ear for what it is asked meanwhile."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from cpcscale import storage
from cpcscale.cluster.pretrain_data import open_data
from cpcscale.errors import UserError
from cpcscale.train.loop import pretrain, thread_feed
from cpcscale.train.observer import Observer, RunRequests, StoppedError
from cpcscale.train.ranks import Ranks

_LISTEN_EVERY_S = 0.5
# The last checkpoint before a node is taken away.
_BEFORE_S = 5.0


def run_worker(spec: dict[str, Any]) -> None:
    """One worker. A user's error is left with the driver and not tried again."""
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
        data = open_data(config)
        if data.train.fingerprint != spec["fingerprint"]:
            raise UserError(
                f"the index at {data.train.base} is another version than when this run was started: start the same "
                "command again to take it over"
            )
        # The others learn from rank 0 with each step.
        listening = _listening(mailbox, requests, observer) if ranks.first else contextlib.nullcontext()
        with listening, ranks.detect_lost_peers():
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
def _listening(mailbox: Any, requests: RunRequests, observer: Observer) -> Iterator[None]:
    """Passes on, for the block, a driver that is to stop and a node that is to be taken away."""
    import ray

    ended, preemption = threading.Event(), _preemption(observer)

    def listen() -> None:
        known, again_s = None, math.inf
        while not ended.wait(_LISTEN_EVERY_S):
            if ray.get(mailbox.stopping.remote()):
                requests.stop()
                return
            info = preemption()
            if info and info != known:
                known = info
                # What is done meanwhile is not to be done again.
                again_s = (info.deadline_ms or math.inf) / 1000 - _BEFORE_S
                again_s = again_s if again_s > time.time() + _BEFORE_S else math.inf
                requests.save()
                observer.note("a node is to be taken away: making a checkpoint, going on while it is there")
            elif time.time() >= again_s:
                again_s = math.inf
                requests.save()

    def quietly() -> None:
        try:
            listen()
        except ray.exceptions.RayError:
            # Whom it listened to is gone, and so will this worker be.
            return

    threading.Thread(target=quietly, name="listen", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _preemption(observer: Observer) -> Callable[[], Any]:
    """Says what Ray Train's watcher has told this worker, as it tells each (a ray.train.PreemptionInfo); None before.

    ray.train.get_preemption_info() hands round what rank 0 knows of it, by a barrier of all workers in one actor, which
    holds 1,000 calls at a time: with more workers it would wait for good.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        context = get_train_context().preemption_context
    except (ImportError, AttributeError):
        observer.note(
            "this version of Ray does not say when a node is to be taken away: no checkpoint is made just then"
        )
        return lambda: None
    return lambda: context.preemption_info
