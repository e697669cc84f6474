"""`cpcscale bench train`: an update of one rank, against the same network written plainly and this machine's limit.

Everything is measured in one process and in turns: updates on a fixed batch in memory (`memory`) and from the real feed
(`feed`), the plain network of bench/plain.py with negatives gathered for each prediction and with those of a window
shared, and the rate of large matrix products, over the operations that the model's formula counts (`gemm_limit`).
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cpcscale import config, storage
from cpcscale.bench import corpus, plain
from cpcscale.bench.turns import account, in_turns, ratio
from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC, build
from cpcscale.model.size import facts
from cpcscale.objective.infonce import InfoNCEConfig, Latents, comparable, counts
from cpcscale.progress import note
from cpcscale.shards.index import Index
from cpcscale.stream.counts import shard_windows
from cpcscale.stream.draft import Batch
from cpcscale.stream.feed import FeedSource, ThreadFeed, decode_threads
from cpcscale.stream.order import Order
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.step import TrainStep

# The sides of the matrices whose product is this machine's limit: larger ones are no faster.
_GEMM = (4096, 1024, 1024)
_GEMM_TIMES = 8


@dataclass(kw_only=True)
class TrainBenchConfig(Recipe):
    """What a train bench measures: a recipe, whose train.batch one rank takes at once."""

    audio: str = "tests/data/speech"
    # Speech that the feed reads, as wav.
    hours: float = 0.5
    # Measurements of each, in turns; the median counts.
    runs: int = 5
    # Updates in a measurement.
    updates: int = 2
    # Whether the plain network is measured too: its gathered negatives take seconds and GBs.
    plain: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        config.at_least(1, runs=self.runs, updates=self.updates)
        model = self.model
        kind = (
            model.encoder.norm,
            model.context.kind,
            model.context.layers,
            model.predictor.kind,
            self.objective.scope,
        )
        if self.plain and kind != ("none", "gru", 1, "linear", "utterance"):
            raise UserError(
                "the plain network is of the paper's kind (no norm, one GRU, linear predictors, negatives from the "
                f"utterance) and this config is not ({', '.join(map(str, kind))}): add plain=false"
            )


def bench_train(spec: TrainBenchConfig, profile: str = "") -> dict[str, Any]:
    """Measures and returns the figures that `_figures` names; `profile` names a file for a trace of updates."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpcscale-bench-")))
        note(f"bench train: making {spec.hours:g} h of speech")
        index = corpus.make(
            spec.audio, folder, codec="wav", hours=spec.hours, utterance_s=spec.window.seconds, shard_mb=32
        )
        bench = _Bench(spec, index)
        if profile:
            bench.trace(profile)
        contenders: dict[str, Callable[[], _Row]] = {
            "memory": lambda: bench.updates(spec.objective),
            "each": lambda: bench.updates(replace(spec.objective, draw="each")),
            "feed": bench.fed,
            "gemm_limit": bench.limit,
        }
        if spec.plain:
            contenders["plain_matmul"] = lambda: bench.plainly("shared")
            contenders["plain_gathered"] = lambda: bench.plainly("each")
        return _figures(bench, in_turns("bench train", contenders, spec.runs))


@dataclass(frozen=True)
class _Row:
    """One measurement: seconds of audio (operations for the limit), the wall time they took, and where that went."""

    amount: float
    wall_s: float
    seconds: dict[str, float]

    @property
    def rate(self) -> float:
        return self.amount / self.wall_s


class _Bench:
    """The network, the batch and the feed that all measurements share."""

    def __init__(self, spec: TrainBenchConfig, index: Index) -> None:
        self.spec, self._ranks, self._scale = spec, Ranks.current(), index.wave_scale()
        torch.set_num_threads(spec.train.threads or os.cpu_count() or 1)
        order = Order(shard_windows(index, spec.window), spec.seed, spec.train.lanes, spec.train.batch)
        self._source = FeedSource(index, order, spec.window, spec.feed)
        feed = self._feed()
        self._batch = feed.next()
        feed.close()
        self._steps: dict[str, TrainStep] = {}
        self.facts = facts(spec.model, spec.window.samples, spec.train.batch)
        self.updates(spec.objective)
        # Before anything else is measured in this process.
        self.peak_mib = self._peak_bytes() / 2**20

    def updates(self, objective: InfoNCEConfig) -> _Row:
        """Updates on the batch in memory."""
        return self._updated(self._step(objective), lambda: self._batch)

    def fed(self) -> _Row:
        """Updates on what the feed makes; its start is no part of a long run."""
        step, feed = self._step(self.spec.objective), self._feed()
        try:
            step(feed.next(), 0, scored=False)
            return self._updated(step, feed.next)
        finally:
            feed.close()

    def plainly(self, draw: Literal["each", "shared"]) -> _Row:
        """The same update as it is first written: torch's layers, its optimiser's default, one autograd graph."""
        objective, batch, device = replace(self.spec.objective, draw=draw), self._batch, self._ranks.device
        model = self._model()
        network = plain.PlainCPC(model).to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        began = self._now()
        wave_BS = torch.from_numpy(batch.wave_BS).to(device).float() / 32768
        frames_B = torch.from_numpy(batch.samples_B // model.hop_samples).to(device)
        key_B = torch.from_numpy(batch.key_B).to(device)
        z_BTC, predictions_BTKC = network(wave_BS)
        z_BTC, predictions_BTKC = comparable(z_BTC, predictions_BTKC, objective)
        scale = torch.tensor(objective.scale(model.channels), device=device)
        rows = Latents(z_BTC, predictions_BTKC, scale, frames_B, key_B)
        (plain.loss_K(rows, objective) / counts(frames_B, network.steps)).mean().backward()
        optimizer.step()
        return _Row(batch.audio_s, self._now() - began, {})

    def limit(self) -> _Row:
        """Operations a second of fp32 matrix products that are large enough."""
        rows, inner, columns = _GEMM
        shapes = (rows, inner), (inner, columns), (rows, columns)
        one, other, out = (torch.ones(shape, device=self._ranks.device) for shape in shapes)
        torch.mm(one, other, out=out)
        began = self._now()
        for _ in range(_GEMM_TIMES):
            torch.mm(one, other, out=out)
        return _Row(2.0 * rows * inner * columns * _GEMM_TIMES, self._now() - began, {})

    def trace(self, path: str) -> None:
        """Writes what some updates do, for a browser's tracing page (chrome://tracing, ui.perfetto.dev)."""
        with torch.profiler.profile() as profiler:
            self.updates(self.spec.objective)
        with storage.publishing(path) as aside:
            profiler.export_chrome_trace(str(aside))

    def _updated(self, step: TrainStep, take: Callable[[], Batch]) -> _Row:
        before, audio_s = step.timeline.seconds(), 0.0
        began = self._now()
        step.timeline.mark("")
        for _ in range(self.spec.updates):
            batch = take()
            step.timeline.mark("wait")
            step(batch, 0, scored=False)
            audio_s += batch.audio_s
        wall_s = self._now() - began
        after = step.timeline.seconds()
        return _Row(audio_s, wall_s, {name: after[name] - before.get(name, 0.0) for name in after if name})

    def _now(self) -> float:
        """Seconds, once a GPU has done what it was asked for."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return time.perf_counter()

    def _peak_bytes(self) -> int:
        """The most memory so far: of the GPU where there is one, else of this process."""
        if self._ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._ranks.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _step(self, objective: InfoNCEConfig) -> TrainStep:
        """The updates of a network of their own, the first of which is over."""
        name = f"{objective.scope} {objective.draw}"
        if name not in self._steps:
            self._steps[name] = TrainStep(self._model(), replace(self.spec, objective=objective), self._ranks, total=1)
            self._steps[name](self._batch, 0, scored=False)
        return self._steps[name]

    def _model(self) -> CPC:
        offset, gain = self._scale
        return build(self.spec.model, self.spec.seed, offset=offset, gain=gain).to(self._ranks.device)

    def _feed(self) -> ThreadFeed:
        threads = decode_threads(self.spec.feed.decode_threads, 1)
        return ThreadFeed(self._source, range(self.spec.train.lanes), 0, threads=threads)


def _figures(bench: _Bench, rows: dict[str, list[_Row]]) -> dict[str, Any]:
    """Medians over the runs, and medians of the ratios of neighbouring measurements."""
    limit = rows.pop("gemm_limit")
    operations = 3 * bench.facts.flops_per_s.total
    rate = {name: statistics.median(row.rate for row in each) for name, each in rows.items()}
    gemm = statistics.median(row.rate for row in limit)
    plainly = {f"{name}_audio_s_per_s": round(rate[name], 2) for name in rate if name.startswith("plain")}

    def against(name: str, other: list[_Row], per: float = 1.0) -> float:
        return round(ratio([per * row.rate for row in rows[name]], [row.rate for row in other]), 3)

    figures = {
        "parameters": int(bench.facts.parameters.total),
        "batch": bench.spec.train.batch,
        "window_s": bench.spec.window.seconds,
        "draw": bench.spec.objective.draw,
        "threads": torch.get_num_threads(),
        "runs": bench.spec.runs,
        "audio_s_per_s": {name: round(rate[name], 2) for name in ("memory", "feed", "each")},
        **plainly,
        "gemm_gflop_per_s": round(gemm / 1e9, 1),
        "gemm_limit_audio_s_per_s": round(gemm / operations, 2),
        "ratio_to_gemm_limit": against("memory", limit, operations),
        "data_wait_share": round(statistics.median(row.seconds["wait"] / row.wall_s for row in rows["feed"]), 4),
        "peak_mib": round(bench.peak_mib),
        "seconds": {name: _account(rows[name]) for name in ("memory", "feed")},
    }
    if plainly:
        figures["ratio_to_plain_matmul"] = against("memory", rows["plain_matmul"])
        figures["ratio_to_plain_gathered"] = against("memory", rows["plain_gathered"])
        figures["ratio_each_to_plain_gathered"] = against("each", rows["plain_gathered"])
    return figures


def _account(rows: list[_Row]) -> dict[str, float]:
    return account([row.seconds for row in rows], [row.wall_s for row in rows], "unattributed")
