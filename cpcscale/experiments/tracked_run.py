"""The tracked run of a driver: it never stays RUNNING when the driver ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cpcscale.cluster import ray_loss
from cpcscale.runs.lease import Lease
from cpcscale.tracking.about import About, DataInput, source_tags
from cpcscale.tracking.outbox import always
from cpcscale.tracking.store import TrackingConfig
from cpcscale.tracking.tracker import Tracker

if TYPE_CHECKING:
    # A pretraining, which is tracked too, does without the code of recognisers.
    from cpcscale.emotion.corpora.corpus import Corpus
    from cpcscale.emotion.recipe import EmotionRecipe


@contextlib.contextmanager
def tracked_run(
    tracking: TrackingConfig,
    lease: Lease | None,
    run_dir: str,
    *,
    kind: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    about: About,
    parent: str | None = None,
) -> Iterator[tuple[Tracker, dict[str, float]]]:
    """Starts a tracked run for the `with` block; yields its tracker and a dict to fill with summary metrics.

    The run ends as FINISHED; as KILLED where the process was asked to end (Ctrl-C, a signal of ENDING, exit); as FAILED
    after any other error. After a process that could do nothing any more, the next start in `run_dir` ends it (settle).
    If another driver took the `lease` of the folder over, the run is that driver's, and is left as it is.
    """
    tracker = Tracker.start(
        tracking,
        kind=kind,
        name=name,
        run_dir=run_dir,
        tags=source_tags() | dict(tags),
        params=params,
        about=about,
        parent=parent,
        allowed=lease.held if lease else always,
    )
    status: str = "FAILED"
    summary: dict[str, float] = {}

    def finish() -> None:
        if lease is None or lease.held(now=True):
            tracker.finish(status, summary if status == "FINISHED" else {})

    with ray_loss.guarded(end=finish):
        try:
            # A death of Ray interrupts the block as Ctrl-C does, and is no request to end.
            with ray_loss.guarded():
                yield tracker, summary
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        except Exception as error:
            tracker.outcome(f"It failed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
            raise
        finally:
            finish()


def about_recognisers(
    title: str, what: str, recipe: EmotionRecipe, corpora: Mapping[str, Corpus], more: Sequence[DataInput] = ()
) -> About:
    """What MLflow's pages show of runs that fit recognisers to `corpora`, each by the place where it was read."""
    data, told = [], []
    for place, corpus in corpora.items():
        counts = {"utterances": len(corpus.utterances), "speakers": len(set(corpus.speakers) - {""})}
        data.append(DataInput(corpus.name, corpus.digest, place, "training", counts))
        told.append(f"{corpus.name} ({counts['utterances']:,} utterances of {counts['speakers']} speakers)")
    split = recipe.protocol.split
    return About(f"{title}, {split}", f"{what} on {', '.join(told)}, split {split}", (*data, *more))
