"""What one worker of a pretraining does: its ranks, its data, the loop, and an ear for what it is asked meanwhile."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cpcscale import storage
from cpcscale.cluster.data import open_data
from cpcscale.errors import UserError
from cpcscale.train.loop import pretrain, thread_feed
from cpcscale.train.notices import Notices, StoppedError
from cpcscale.train.observer import Observer
from cpcscale.train.ranks import Ranks

_LISTEN_EVERY_S = 0.5
# The last checkpoint before a node is taken away.
_BEFORE_S = 5.0


def work(spec: dict[str, Any]) -> None:
    """One worker. A user's error is left with the driver and not tried again."""
    import ray
    from ray.train.torch import get_device

    from cpcscale.cluster.feeders import actor_feed
    from cpcscale.cluster.mailbox import MailboxObserver

    config, mailbox = spec["config"], spec["mailbox"]
    if ray.get(mailbox.outcome.remote()).error:
        return
    storage.configure(config.storage)
    ranks = Ranks.current(get_device())
    make_feed = partial(actor_feed, config.storage) if config.feed.kind == "actors" else thread_feed
    observer, notices = MailboxObserver(mailbox), Notices()
    try:
        data = open_data(config)
        if data.train.fingerprint != spec["fingerprint"]:
            raise UserError(
                f"the index at {data.train.base} is another version than when this run was started: start the same "
                "command again to take it over"
            )
        ending = _listen(mailbox, notices, ranks, observer)
        try:
            with ranks.meeting():
                summary = pretrain(config, data, config.run_dir, ranks, observer, make_feed, spec["holder"], notices)
        finally:
            ending()
    except UserError as failure:
        ray.get(mailbox.fail.remote(str(failure)))
        raise
    except StoppedError as stopped:
        ray.get(mailbox.stopped.remote(str(stopped)))
        return
    if ranks.first:
        ray.get(mailbox.finish.remote(summary))


def _listen(mailbox: Any, notices: Notices, ranks: Ranks, observer: Observer) -> Callable[[], None]:
    """Passes on, until what it returns is called, a node that is to be taken away and a driver that is to stop."""
    import ray
    import ray.train

    ended = threading.Event()

    def driver() -> None:
        while not ended.wait(_LISTEN_EVERY_S):
            if ray.get(mailbox.stopping.remote()):
                notices.stop()
                return

    def nodes() -> None:
        known, again_s = None, math.inf
        while not ended.wait(_LISTEN_EVERY_S):
            # A barrier among these threads of all workers, who learn what rank 0 knows.
            info = ray.train.get_preemption_info()
            if info and info != known:
                known = info
                # What is done meanwhile is not to be done again.
                again_s = (info.deadline_ms or math.inf) / 1000 - _BEFORE_S
                again_s = again_s if again_s > time.time() + _BEFORE_S else math.inf
                notices.save()
                if ranks.first:
                    observer.note("a node is to be taken away: making a checkpoint, going on while it is there")
            elif time.time() >= again_s:
                again_s = math.inf
                notices.save()

    def quietly(listen: Callable[[], None]) -> None:
        try:
            listen()
        except ray.exceptions.RayError:
            # Whom it listened to is gone, and so will this worker be.
            return

    for listen in (driver, nodes) if ranks.first else (nodes,):
        threading.Thread(target=quietly, args=(listen,), name=f"listen-{listen.__name__}", daemon=True).start()
    return ended.set
