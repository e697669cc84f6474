"""Probes the checkpoints of a pretraining while the run goes on: an actor scores them, one at a time.

When a checkpoint is published, the driver has the newest one that is due scored. Checkpoints published while a probe
runs are skipped, with a line that says so. Results go to the run's folder (runs/probe_log.py) and to the tracker;
workers are not involved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpcscale import storage
from cpcscale.cluster import ray_loss
from cpcscale.cluster.pretrain_config import PretrainConfig, ProbeConfig
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.probe import open_waves, probe, probe_recipe
from cpcscale.emotion.protocol.folds import fold_splits, marks
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.progress import note
from cpcscale.runs.ledger import CheckpointEntry, Ledger
from cpcscale.runs.probe_log import Probe, Probes, ProbeSet
from cpcscale.storage import StorageConfig
from cpcscale.tracking.tracker import Tracker
from cpcscale.train.checkpoint import load_encoder

# On cores shared with workers, the probe only uses idle time.
_NICENESS = 19
_JOIN_S = 0.5


def check_probe(config: PretrainConfig) -> tuple[Corpus, ProbeSet]:
    """(the labelled corpus, its description for the run's folder).

    Raises UserError when there is no corpus, when it does not fit the protocol, and when the run was probed on another.
    """
    corpus = open_corpus(config.probe.corpus)
    recipe = _recipe(config.probe)
    probe_set = ProbeSet(
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        speakers=sorted(set(corpus.speakers) - {""}),
        marks=marks(recipe, corpus, fold_splits(recipe, corpus)),
        settings={"split": config.probe.split, "head": config.probe.head, "max_s": config.probe.corpus.max_s},
        stride=config.checkpoint.every_steps * config.probe.every,
    )
    before = Probes(config.run_dir).probe_set()
    if before and dataclasses.replace(before, stride=probe_set.stride) != probe_set:
        raise UserError(
            f"{storage.shown(config.run_dir)} was probed on {_described(before)}, this config says "
            f"{_described(probe_set)}: their scores are not comparable; keep the set, or name another run_dir"
        )
    return corpus, probe_set


class ProbeScorer:
    """The actor: scores one checkpoint after the other on the same corpus, which it reads once."""

    def __init__(self, config: ProbeConfig, stores: StorageConfig, corpus: Corpus) -> None:
        import os

        import torch

        os.nice(_NICENESS)
        torch.set_num_threads(max(1, config.cpus))
        storage.configure(stores)
        self._recipe, self._corpus = _recipe(config), corpus
        self._waves: Waves | None = None

    def score(self, url: str) -> tuple[dict[str, float], float]:
        """(CCC by primitive and mean, hours of audio that the network has seen). Raises UserError for bad audio."""
        network, source = load_encoder(url)
        if self._waves is None:
            self._waves = open_waves(self._recipe, self._corpus)
        return probe(self._recipe, self._waves, network), source["audio_s"] / 3600


class RunProbes:
    """Runs the probes of one run from its driver.

    Call `wake` when a checkpoint was published, `finish` after the last one.
    """

    def __init__(self, config: PretrainConfig, corpus: Corpus, probe_set: ProbeSet, tracker: Tracker) -> None:
        self._config, self._tracker, self._set = config, tracker, probe_set
        self._ledger, self._probes = Ledger(config.run_dir), Probes(config.run_dir)
        self._wake, self._ending, self._closed = threading.Event(), False, False
        self._last = self._resume()
        # On the driver's node if possible: there the corpus was read already.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(num_cpus=config.probe.cpus, scheduling_strategy=here)(ProbeScorer)
        self._start = partial(actor.remote, config.probe, config.storage, corpus)
        self._scorer = self._start()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        """Lets the probe thread look for a checkpoint that is due. Returns at once."""
        self._wake.set()

    def finish(self) -> dict[str, Any]:
        """Waits until the newest checkpoint is probed. Returns the results of all probes, for the run's summary."""
        self._ending = True
        self.wake()
        while self._thread.is_alive():
            # With a timeout, so that Ctrl-C is handled.
            self._thread.join(_JOIN_S)
        probes = self._probes.all()
        best = self._probes.best(self._ledger.head()) if self._config.checkpoint.best_by == "probe" else None
        return {
            "corpus": self._set.corpus,
            "split": self._config.probe.split,
            "speakers": len(self._set.speakers),
            "marks": self._set.marks,
            "scores": [
                {name: getattr(each, name) for name in ("step", "audio_hours", "ccc", "seconds")}
                for each in probes
                if each.status == "done"
            ],
            "failed": [{"step": each.step, "why": each.why} for each in probes if each.status == "failed"],
            "best_step": best.step if best else None,
        }

    def close(self) -> None:
        """Ends the actor and abandons a probe in progress."""
        self._closed = True
        self.wake()
        # A call to a Ray that has died may never return.
        if not ray_loss.lost():
            ray.kill(self._scorer)
            self._thread.join()

    def _resume(self) -> int:
        """Continues the probes of an earlier driver. Returns the step of the last completed one, or -1."""
        for each in self._ledger.head().checkpoints:
            before = self._probes.of(each.folder)
            if before and before.status != "done":
                self._probes.remove(each.folder)
        self._probes.write_set(self._set)
        last = -1
        for done in self._probes.all():
            if done.status == "done":
                # The earlier driver may have died before it was tracked; the tracker skips what it already has.
                self._log(done)
                last = done.step
        return last

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            ending = self._ending
            try:
                while not self._closed and (chosen := self._probes.claim(self._ledger, self._set, every=ending)):
                    self._probe(chosen)
            except UserError as error:
                # The store is away: try again with the next checkpoint.
                self._say(f"no probe now, trying again at the next checkpoint: {error}")
            if ending:
                return

    def _probe(self, chosen: CheckpointEntry) -> None:
        if passed := max(0, (chosen.step - 1) // self._set.stride - max(self._last, 0) // self._set.stride):
            self._say(f"step {chosen.step} now; {passed} checkpoint(s) before it were passed over")
        if self._ending:
            self._say(f"waiting for the probe of step {chosen.step}")
        began, self._last = time.monotonic(), chosen.step
        done = Probe(folder=chosen.folder, step=chosen.step, status="done")
        try:
            ccc, hours = ray.get(self._scorer.score.remote(self._ledger.url(chosen)))
        except ray.exceptions.RayError as error:
            if self._closed:
                return
            self._failed(dataclasses.replace(done, status="failed", why=_why(error)))
            if not isinstance(error, ray.exceptions.RayTaskError):
                # Its process died or cannot be reached: the next probe needs a new one.
                ray.kill(self._scorer)
                self._scorer = self._start()
            return
        done = dataclasses.replace(done, ccc=ccc, audio_hours=hours, seconds=round(time.monotonic() - began, 3))
        self._probes.write(done)
        self._log(done)
        self._say(
            f"step {done.step}, {hours:.2f} h: CCC mean {ccc['mean']:.3f} "
            f"({', '.join(f'{name} {value:.3f}' for name, value in ccc.items() if name != 'mean')}), "
            f"{done.seconds:.1f} s"
        )

    def _failed(self, probe: Probe) -> None:
        self._probes.write(probe)
        self._tracker.tag("probe_failed", f"step {probe.step}: {probe.why}")
        self._say(f"step {probe.step} failed, the run goes on: {probe.why}")

    def _log(self, done: Probe) -> None:
        values = {f"probe_ccc_{name}": value for name, value in done.ccc.items()}
        self._tracker.log(done.step, values | {"probe_audio_hours": done.audio_hours, "probe_s": done.seconds})

    def _say(self, text: str) -> None:
        note(f"probe: {text}")


@contextlib.contextmanager
def run_probes(config: PretrainConfig, corpus: Corpus, probe_set: ProbeSet, tracker: Tracker) -> Iterator[RunProbes]:
    """`RunProbes` for the block; closes it at the end."""
    probes = RunProbes(config, corpus, probe_set, tracker)
    try:
        yield probes
    finally:
        probes.close()


def _recipe(config: ProbeConfig) -> EmotionRecipe:
    return probe_recipe(config.corpus, config.split, config.audio_cache)


def _described(probe_set: ProbeSet) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in probe_set.settings.items())
    return f"corpus {probe_set.corpus} ({probe_set.corpus_digest[:12]}; {settings})"


def _why(error: Exception) -> str:
    """The cause of an actor's error in one line."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        text = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
        return " ".join(text.split())
    return "its process died, maybe out of memory: use a smaller corpus, or give the cluster more memory"
