"""`cpcscale bench train`: the speed of updates against a plainly written network, more ranks, and limits.

All contenders are measured in turns: updates of one rank in this process on a fixed batch in memory (`memory`) and on
the feed's batches (`feed`); the same with several ranks that share the batch; the network of bench/plain_network.py
with negatives for each prediction and with negatives shared by a window; large matrix products, whose rate over the
model's operations is the limit of an update (`gemm_limit`); and the loop without its network (`null_loop`) against the
feed alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from cpcscale import config, storage
from cpcscale.bench import loop_without_network, plain_network, speech_set
from cpcscale.bench.interleaved import measure_in_turns
from cpcscale.bench.ranks import rank_groups, refuse_without_gpus
from cpcscale.bench.train_figures import FixedCosts, figures
from cpcscale.bench.updates import UpdateBench, UpdateMeasurement
from cpcscale.errors import UserError
from cpcscale.model.cost import NetworkCost, network_cost
from cpcscale.objective.infonce import ScoredRows, count_predictions, prepare_vectors
from cpcscale.objective.objectives import chosen
from cpcscale.progress import note
from cpcscale.shards.index import Index
from cpcscale.stream.lanes import Lanes
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.step import TrainStep

# The sizes of the matrices whose product is this machine's limit: larger ones are not faster.
_GEMM = (4096, 1024, 1024)
_GEMM_TIMES = 8


@dataclass(kw_only=True)
class TrainBenchConfig(Recipe):
    """The settings of `cpcscale bench train`, on top of the recipe that is measured."""

    # A folder of audio from which the set is made, repeated as often as needed.
    audio: str = "tests/data/speech"
    # Hours of speech in the set, as wav.
    hours: float = 0.5
    # Measurements of each contender, in turns; the median counts.
    runs: int = 5
    # Updates in a measurement.
    updates: int = 2
    # Numbers of ranks that are measured in addition to one: processes that share the cores, or have a GPU each.
    ranks: list[int] = field(default_factory=list)
    # Updates of the loop without its network, of which the first 10 are not measured; 0: this is left out.
    null_updates: int = 40
    # Whether the plain network is measured too: with negatives for each prediction it takes seconds and GBs.
    plain: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        config.at_least(1, runs=self.runs, updates=self.updates)
        config.at_least(2, ranks=min(self.ranks, default=2))
        # Raises the error here that the run would raise later.
        Lanes(round(self.hours * 3600 / self.window.seconds), self.train.lanes, self.train.batch)
        if max(self.ranks, default=0) > self.train.lanes:
            raise UserError(
                f"ranks={self.ranks} share train.lanes={self.train.lanes} lanes and some would have none: list at most "
                f"{self.train.lanes} ranks, or raise train.lanes and with it train.batch"
            )
        if 0 != self.null_updates <= loop_without_network.LAP:
            raise UserError(
                f"null_updates={self.null_updates} leaves nothing to measure after the first "
                f"{loop_without_network.LAP}: give more, or 0 to leave the loop without its network out"
            )
        self._refuse_unlike_plain()

    def _refuse_unlike_plain(self) -> None:
        model = self.model
        kind = (
            model.encoder.kind,
            model.encoder.norm,
            model.context.kind,
            model.context.layers,
            model.predictor.kind,
            self.objective.scope,
        )
        if self.plain and kind != ("conv", "none", "gru", 1, "linear", "utterance"):
            raise UserError(
                "the plain network is of the paper's kind (convolutions of the waveform, no norm, one GRU, linear "
                f"predictors, negatives from the utterance) and this config is not ({', '.join(map(str, kind))}): add "
                "plain=false"
            )
        if self.plain and len(chosen(self.objective, model.predictor.steps)) > 1:
            raise UserError("the plain network minimises InfoNCE alone, and this config more: add plain=false")


def bench_train(spec: TrainBenchConfig, profile: str = "") -> dict[str, Any]:
    """Measures, and returns the figures of `train_figures.figures`; `profile` is a file for a trace of some updates."""
    refuse_without_gpus(spec.ranks)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cpcscale-bench-")))
        note(f"bench train: making {spec.hours:g} h of speech")
        index = speech_set.make_speech_set(
            spec.audio, folder, codec="wav", hours=spec.hours, utterance_s=spec.window.seconds, shard_mb=32
        )
        if spec.ranks:
            note(f"bench train: starting {' and '.join(map(str, dict.fromkeys(spec.ranks)))} ranks")
        together = stack.enter_context(rank_groups(spec.ranks, spec, index, spec.updates, folder))
        one = UpdateBench(spec, index, Ranks.current(), spec.updates)
        if profile:
            _trace(one, profile)
        contenders: dict[str, Callable[[], UpdateMeasurement]] = {
            "memory": one.measure_memory,
            "feed": one.measure_feed,
        }
        for world, group in together.items():
            for place in ("memory", "feed"):
                contenders[f"{place} of {world}"] = partial(group.measure, place)
        contenders["each"] = lambda: one.measure_memory(replace(spec.objective, draw="each"))
        contenders["gemm_limit"] = lambda: _limit(one)
        if spec.plain:
            contenders["plain_matmul"] = lambda: _plainly(one, "shared")
            contenders["plain_gathered"] = lambda: _plainly(one, "each")
        if spec.null_updates:
            contenders["null_loop"] = lambda: loop_without_network.measure_loop(
                spec, index, one.ranks, spec.null_updates, folder
            )
            contenders["feed_alone"] = lambda: loop_without_network.measure_feed_alone(
                one.source, one.ranks, spec.null_updates
            )
        rows = measure_in_turns("bench train", contenders, spec.runs)
        peak_mib = {1: one.peak_mib} | {world: group.peak_mib for world, group in together.items()}
        return {
            "parameters": int(_facts(spec).parameters.total),
            "batch": spec.train.batch,
            "window_s": spec.window.seconds,
            "draw": spec.objective.draw,
            "threads": torch.get_num_threads(),
            "runs": spec.runs,
            **figures(rows, _costs(one, index, folder), peak_mib),
        }


def _costs(one: UpdateBench, index: Index, folder: Path) -> FixedCosts:
    spec = one.recipe
    with_network, without = (
        loop_without_network.count_marks(spec, index, one.ranks, kind, folder)
        for kind in (TrainStep, loop_without_network.StepWithoutNetwork)
    )
    return FixedCosts(
        _facts(spec).flops_per_s.total, with_network, without, loop_without_network.measure_mark_s(one.ranks.device)
    )


def _facts(spec: Recipe) -> NetworkCost:
    return network_cost(spec.model, spec.window.samples, spec.train.batch)


def _plainly(one: UpdateBench, draw: Literal["each", "shared"]) -> UpdateMeasurement:
    """The same update written plainly: torch's layers, its optimiser with defaults, one autograd graph."""
    objective, batch, device = replace(one.recipe.objective, draw=draw), one.batch, one.ranks.device
    model = one.new_model()
    network = plain_network.PlainCPC(model).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    began = one.now_s()
    wave_BS = torch.from_numpy(batch.wave_BS).to(device).float() / 32768
    frames_B = torch.from_numpy(batch.samples_B // model.hop_samples).to(device)
    key_B = torch.from_numpy(batch.key_B).to(device)
    z_BTC, predictions_BTKC = network(wave_BS)
    z_BTC, predictions_BTKC = prepare_vectors(z_BTC, predictions_BTKC, objective)
    scale = torch.tensor(objective.scale(model.channels), device=device)
    rows = ScoredRows(z_BTC, predictions_BTKC, scale, frames_B, key_B)
    (plain_network.loss_K(rows, objective) / count_predictions(frames_B, network.steps)).mean().backward()
    optimizer.step()
    return UpdateMeasurement(batch.audio_s, one.now_s() - began)


def _limit(one: UpdateBench) -> UpdateMeasurement:
    """Measures large fp32 matrix products; the amount is floating-point operations."""
    rows, inner, columns = _GEMM
    shapes = (rows, inner), (inner, columns), (rows, columns)
    left, right, out = (torch.ones(shape, device=one.ranks.device) for shape in shapes)
    torch.mm(left, right, out=out)
    began = one.now_s()
    for _ in range(_GEMM_TIMES):
        torch.mm(left, right, out=out)
    return UpdateMeasurement(2.0 * rows * inner * columns * _GEMM_TIMES, one.now_s() - began)


def _trace(one: UpdateBench, path: str) -> None:
    """Writes a profile of some updates, for a browser's tracing page (chrome://tracing, ui.perfetto.dev)."""
    with torch.profiler.profile() as profiler:
        one.measure_memory()
    with storage.publishing(path) as aside:
        profiler.export_chrome_trace(str(aside))
