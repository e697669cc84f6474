"""Probes of a pretraining's checkpoints: scored by an actor of its own, one at a time, while the run goes on.

The driver hears when a checkpoint is published and has the newest one that is due scored; those that came meanwhile are
passed over, and that is said. What comes of it stands in the run's folder (runs/probe_log.py) and in the tracker; no
worker knows of it.
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
from cpcscale.cluster.pretrain_config import PretrainConfig, ProbeConfig
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import Corpus
from cpcscale.emotion.crossval import fold_splits, marks
from cpcscale.emotion.probe import open_waves, probe, probe_recipe
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.progress import note
from cpcscale.runs.ledger import CheckpointEntry, Ledger
from cpcscale.runs.probe_log import Probe, Probes, ProbeSet
from cpcscale.storage import StorageConfig
from cpcscale.tracking.tracker import Tracker
from cpcscale.train.checkpoint import load_encoder

# Beside workers on the same cores it takes what they leave.
_NICENESS = 19
_JOIN_S = 0.5


def check_probe(config: PretrainConfig) -> tuple[Corpus, ProbeSet]:
    """The labelled set and what the run's folder says of it.

    Raises UserError when there is none, when it does not fit the protocol, and for a run that was probed on another.
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
            f"{_described(probe_set)}: their figures do not compare; keep the set, or name another run_dir"
        )
    return corpus, probe_set


class ProbeScorer:
    """The actor: scores one checkpoint after the other on the same set, read once."""

    def __init__(self, config: ProbeConfig, stores: StorageConfig, corpus: Corpus) -> None:
        import os

        import torch

        os.nice(_NICENESS)
        torch.set_num_threads(max(1, config.cpus))
        storage.configure(stores)
        self._recipe, self._corpus = _recipe(config), corpus
        self._waves: Waves | None = None

    def score(self, url: str) -> tuple[dict[str, float], float]:
        """(CCC by primitive and mean, hours of audio that the network had heard). Raises UserError for bad audio."""
        network, source = load_encoder(url)
        if self._waves is None:
            self._waves = open_waves(self._recipe, self._corpus)
        return probe(self._recipe, self._waves, network), source["audio_s"] / 3600


class RunProbes:
    """The probes of one run in its driver: `wake` when a checkpoint is published, `finish` when the last one is."""

    def __init__(self, config: PretrainConfig, corpus: Corpus, probe_set: ProbeSet, tracker: Tracker) -> None:
        self._config, self._tracker, self._set = config, tracker, probe_set
        self._ledger, self._probes = Ledger(config.run_dir), Probes(config.run_dir)
        self._wake, self._ending, self._gone = threading.Event(), False, False
        self._last = self._take_up()
        # Where the driver has read the corpus, if it can be there.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = ray.remote(num_cpus=config.probe.cpus, scheduling_strategy=here)(ProbeScorer)
        self._start = partial(actor.remote, config.probe, config.storage, corpus)
        self._scorer = self._start()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        """A checkpoint may be there that is due. Returns at once."""
        self._wake.set()

    def finish(self) -> dict[str, Any]:
        """Has the newest checkpoint probed and returns what all probes of the run came to, as the summary says it."""
        self._ending = True
        self.wake()
        while self._thread.is_alive():
            # Ctrl-C is heard between two of them.
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
        """Ends the actor; a probe under way is given up."""
        self._gone = True
        self.wake()
        ray.kill(self._scorer)
        self._thread.join()

    def _take_up(self) -> int:
        """Goes on with what an earlier driver has left; the step of the last probe that counts, or -1."""
        for each in self._ledger.head().checkpoints:
            before = self._probes.of(each.folder)
            if before and before.status != "done":
                self._probes.remove(each.folder)
        self._probes.write_set(self._set)
        last = -1
        for done in self._probes.all():
            if done.status == "done":
                # It may have died before the tracker had it; what that has already, it drops.
                self._log(done)
                last = done.step
        return last

    def _run(self) -> None:
        while not self._gone:
            self._wake.wait()
            self._wake.clear()
            ending = self._ending
            try:
                while not self._gone and (chosen := self._probes.claim(self._ledger, self._set, every=ending)):
                    self._probe(chosen)
            except UserError as error:
                # A store that is away: the next checkpoint is another try.
                self._say(f"none now: {error}")
            if ending:
                return

    def _probe(self, chosen: CheckpointEntry) -> None:
        if passed := max(0, (chosen.step - 1) // self._set.stride - max(self._last, 0) // self._set.stride):
            self._say(f"step {chosen.step} now; {passed} checkpoint(s) before it were passed over")
        if self._ending:
            self._say(f"waiting for that of step {chosen.step}")
        began, self._last = time.monotonic(), chosen.step
        done = Probe(folder=chosen.folder, step=chosen.step, status="done")
        try:
            ccc, hours = ray.get(self._scorer.score.remote(self._ledger.url(chosen)))
        except ray.exceptions.RayError as error:
            if self._gone:
                return
            self._failed(dataclasses.replace(done, status="failed", why=_why(error)))
            if not isinstance(error, ray.exceptions.RayTaskError):
                # Its process is gone, or out of reach: the next checkpoint has another.
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
        self._say(f"step {probe.step} has none, the run goes on: {probe.why}")

    def _log(self, done: Probe) -> None:
        values = {f"probe_ccc_{name}": value for name, value in done.ccc.items()}
        self._tracker.log(done.step, values | {"probe_audio_hours": done.audio_hours, "probe_s": done.seconds})

    def _say(self, text: str) -> None:
        note(f"probe: {text}")


@contextlib.contextmanager
def run_probes(config: PretrainConfig, corpus: Corpus, probe_set: ProbeSet, tracker: Tracker) -> Iterator[RunProbes]:
    """The probes of a run for the block."""
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
    """One line for what the actor ended with."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        text = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
        return " ".join(text.split())
    return "its process died, maybe out of memory: give it a smaller corpus, or more room"
