"""One update: micro-batches forward and backward in the chosen precision, then the optimiser, the same on all ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC
from cpcscale.objective.infonce import (
    InfoNCEConfig,
    LossSums,
    NegativePool,
    ScoredRows,
    count_predictions,
    frame_content,
    infonce,
    prepare_vectors,
    sum_parts,
)
from cpcscale.objective.negatives import Scope
from cpcscale.stream.batch import Batch
from cpcscale.train import optim
from cpcscale.train.augment import add_effects
from cpcscale.train.device import DeviceCopies, make_timeline
from cpcscale.train.ema import Ema
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe

# (z_BTC, predictions_BTKC, scale []), all in fp32.
NetworkOutput = tuple[Tensor, Tensor, Tensor]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """The result of one update; `reduce_scores` turns it into metrics.

    `sums` are those of the objective over this rank's rows, for each prediction step k. The rest describes the global
    batch and is known to the host without waiting for the device: `count_K` valid predictions (on the CPU), `samples`
    of real audio, `bad` windows, rank 0's `request` number and whether it `asked` for something new. `scored` says
    whether the step counted correct predictions and false negatives.
    """

    sums: LossSums
    count_K: Tensor
    samples: int = 0
    bad: int = 0
    request: int = 0
    asked: bool = False
    scored: bool = True

    @property
    def empty(self) -> bool:
        """Whether the global batch had no valid prediction, so that there was no update."""
        return not any(self.count_K.tolist())


class ContrastiveModel(nn.Module):
    """The network and the scale of the scores as one module, as DDP needs; maps waveforms to what the loss compares."""

    def __init__(self, model: CPC, config: InfoNCEConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        # As a logarithm, so that a learnt scale stays above 0.
        log_scale = torch.tensor(math.log(config.scale(model.channels)))
        if config.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.to(model.gain.device)

    def forward(self, wave_BS: Tensor, past_BS: Tensor | None = None) -> NetworkOutput:
        """(z_BTC, predictions_BTKC, scale []) of float waveforms in [-1, 1).

        Contexts are computed from `past_BS` if given, else from `wave_BS`.
        """
        z_BTC, c_BTD = self.model.features(wave_BS, past_BS)
        predictions_BTKC = self.model.predictor(c_BTD)
        with torch.autocast(wave_BS.device.type, enabled=False):
            return *prepare_vectors(z_BTC, predictions_BTKC, self.config), self.log_scale.exp()


@dataclass(frozen=True)
class _Rows:
    """Rows of a batch on the device: float waveforms in [-1, 1), the rest int64.

    `past_BS` is the augmented waveform, if any; `content_BT` the content hash of each frame, on scored steps only.
    """

    wave_BS: Tensor
    past_BS: Tensor | None
    frames_B: Tensor
    key_B: Tensor
    group_B: Tensor
    content_BT: Tensor | None

    def __getitem__(self, piece: slice) -> _Rows:
        content_BT = None if self.content_BT is None else self.content_BT[piece]
        past_BS = None if self.past_BS is None else self.past_BS[piece]
        keys = self.frames_B[piece], self.key_B[piece], self.group_B[piece]
        return _Rows(self.wave_BS[piece], past_BS, *keys, content_BT)

    def latents(self, outputs: NetworkOutput) -> ScoredRows:
        """These rows as the objective takes them, detached from the graph."""
        z_BTC, predictions_BTKC, scale = (part.detach() for part in outputs)
        return ScoredRows(z_BTC, predictions_BTKC, scale, self.frames_B, self.key_B, self.content_BT)


class TrainStep:
    """Makes the `total` updates of a run. Its state is the model, the optimiser, the loss scale and the mean weights.

    The loss is that of the global batch. The counts of valid predictions depend only on lengths and are summed over
    ranks before the forward pass, so each micro-batch's loss has its final weight at once and gradients just add up.
    If negatives come from other rows, all latents of the global batch are computed first and the loss gradient with
    respect to them is cached; then each micro-batch runs forward again and backward (Gao et al. 2021, arXiv
    2101.06983). Accumulation therefore does not change the loss.

    The host never waits for a GPU here: it sums over ranks itself what it needs to know. Whether an update was finite
    is decided and counted on the device; `faults` reads it on steps that are logged anyway.
    """

    def __init__(self, model: CPC, recipe: Recipe, ranks: Ranks, total: int) -> None:
        precision = recipe.train.precision
        if precision == "fp16" and ranks.device.type != "cuda":
            raise UserError("train.precision=fp16 needs a GPU and there is none here: use fp32, or bf16 to try it out")
        self.model, self.recipe, self.ranks, self.total = model, recipe, ranks, total
        self.contrast = ContrastiveModel(model, recipe.objective)
        self.optimizer = optim.build_optimizer(self.contrast, recipe.optim)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16")
        self.ema = Ema(model, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
        self._module = ranks.wrap_ddp(self.contrast)
        self._dtype, self._request = _DTYPES[precision], 0
        self._copy, self._faults = DeviceCopies(ranks.device), torch.zeros(2, dtype=torch.int64, device=ranks.device)
        # Each update marks its phases: copy, allreduce, forward, objective, backward, optimiser.
        self.timeline = make_timeline(ranks.device)

    def __call__(self, batch: Batch, step: int, *, scored: bool = True, request: int = 0) -> StepResult:
        """One update from this rank's rows of the global batch; skipped on all ranks if a gradient is not finite.

        Correct predictions and false negatives are counted if the step is `scored`. Every rank's result holds rank 0's
        `request` number; a step with a new number is scored too.
        """
        self.timeline.mark("unattributed")
        rows, whole_BS = self._to_device(batch, past=self.recipe.augment.past)
        self.timeline.mark("copy")
        count_K, (samples, bad, request) = self._global_counts(batch, request if self.ranks.first else 0)
        self.timeline.mark("allreduce")
        asked, self._request = request != self._request, request
        scored = scored or asked
        rows = self._with_content(rows, whole_BS) if scored else rows
        (weight_K,) = self._copy(self.ranks.world / (count_K.clamp(min=1) * len(count_K)))
        weight_K = self.scaler.scale(weight_K)
        self.optimizer.zero_grad(set_to_none=True)
        own = self.recipe.objective.scope == "utterance"
        sums = sum_parts(
            self._with_own_negatives(rows, weight_K) if own else self._with_pooled_negatives(rows, weight_K)
        )
        result = StepResult(sums, count_K, samples, bad, request, asked, scored)
        if not result.empty:
            self._update(step)
        self.timeline.mark("optimiser")
        return result

    def faults(self) -> tuple[int, int]:
        """(updates skipped, those of them that are faults) since the last call; waits for a GPU.

        With fp16 it is normal that updates are skipped while the loss scale finds its level; they are faults once the
        scale is below 1. In other precisions every skipped update is a fault.
        """
        skipped, nonfinite = self._faults.tolist()
        self._faults.zero_()
        return skipped, nonfinite

    def exchange_s(self) -> tuple[float, float]:
        """(seconds spent so far on exchanging gradients, those of them not hidden by the backward pass)."""
        return self.ranks.exchange_s(self._module)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Gives the network its mean weights for the block; does nothing without a running mean."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepResult:
        """The sums over a batch without an update; `count_K` is this rank's own, not the global one.

        Negatives are always drawn for each prediction from its own utterance, whatever the run trains with, so that
        scores do not depend on how rows are shared out and are comparable between runs.
        """
        rows = self._with_content(*self._to_device(batch, past=False))
        with self._autocast():
            latents = rows.latents(self.contrast(rows.wave_BS))
        sums, _ = infonce(latents, replace(self.recipe.objective, scope="utterance", draw="each"))
        return StepResult(sums, self._counts(batch))

    def _counts(self, batch: Batch) -> Tensor:
        frames_B = torch.from_numpy(batch.samples_B // self.model.hop_samples)
        return count_predictions(frames_B, self.recipe.model.predictor.steps)

    def _global_counts(self, batch: Batch, request: int) -> tuple[Tensor, list[int]]:
        """(count_K, [samples, bad windows, request]) of all ranks' rows."""
        local = torch.tensor([int(batch.samples_B.sum()), len(batch.bad), request])
        totals = self.ranks.sum(torch.cat([self._counts(batch), local]))
        return totals[:-3], totals[-3:].tolist()

    def _with_own_negatives(self, rows: _Rows, weight_K: Tensor) -> Iterator[LossSums]:
        """Forward and backward of one micro-batch after the other, with negatives from each row itself."""
        for piece, last in self._pieces(rows):
            with self._reduce_with(last):
                with self._autocast():
                    outputs = self._module(piece.wave_BS, piece.past_BS)
                self.timeline.mark("forward")
                sums, gradients = infonce(piece.latents(outputs), self.recipe.objective, weight_K=weight_K)
                self.timeline.mark("objective")
                assert gradients is not None
                _backpropagate(outputs, (gradients.z_BTC, gradients.predictions_BTKC, gradients.scale))
            self.timeline.mark("backward")
            yield sums

    def _with_pooled_negatives(self, rows: _Rows, weight_K: Tensor) -> Iterator[LossSums]:
        """Forward and backward with negatives from the rows of all ranks and micro-batches (see the class)."""
        pieces, once = list(self._pieces(rows)), self._is_one_piece()
        outputs = [self._run_network(piece, graph=once) for piece, _ in pieces]
        whole = (
            torch.cat([z_BTC for z_BTC, _, _ in outputs]),
            torch.cat([p_BTKC for _, p_BTKC, _ in outputs]),
            outputs[0][2],
        )
        latents = rows.latents(whole)
        self.timeline.mark("forward")
        pool, own = self._pool(rows, latents.z_BTC)
        self.timeline.mark("allreduce")
        sums, gradients = infonce(latents, self.recipe.objective, pool=pool, weight_K=weight_K)
        assert gradients is not None and gradients.pool_RTC is not None
        self.timeline.mark("objective")
        gradients.z_BTC.add_(self.ranks.sum(gradients.pool_RTC)[own])
        self.timeline.mark("allreduce")
        start = 0
        for (piece, last), kept in zip(pieces, outputs, strict=True):
            part = slice(start, start + len(piece.wave_BS))
            with self._reduce_with(last):
                again = kept if once else self._run_network(piece, graph=True)
                # All pieces share one scale: its gradient is applied once.
                scale = gradients.scale if last else torch.zeros_like(gradients.scale)
                _backpropagate(again, (gradients.z_BTC[part], gradients.predictions_BTKC[part], scale))
            start = part.stop
        self.timeline.mark("backward")
        yield sums

    def _is_one_piece(self) -> bool:
        """Whether all rows of every rank fit one micro-batch. The same on all ranks, whose collectives must match."""
        train = self.recipe.train
        most = -(-train.lanes // self.ranks.world) * (train.batch // train.lanes)
        return not 0 < train.micro_batch < most

    def _run_network(self, piece: _Rows, *, graph: bool) -> NetworkOutput:
        with torch.set_grad_enabled(graph), self._autocast():
            return cast(NetworkOutput, (self._module if graph else self.contrast)(piece.wave_BS, piece.past_BS))

    def _pool(self, rows: _Rows, z_BTC: Tensor) -> tuple[NegativePool, slice]:
        """The latents of the global batch, and the slice of this rank's rows."""
        label_B = rows.group_B if self.recipe.objective.scope == "group" else torch.zeros_like(rows.group_B)
        frames_R, own = self.ranks.gather_rows(rows.frames_B)
        z_RTC, key_R, label_R = (self.ranks.gather_rows(part)[0] for part in (z_BTC, rows.key_B, label_B))
        content_RT = None if rows.content_BT is None else self.ranks.gather_rows(rows.content_BT)[0]
        return NegativePool(z_RTC, Scope.of_pool(frames_R, key_R, label_R, z_BTC.shape[1], own), content_RT), own

    def _update(self, step: int) -> None:
        """The optimiser's step, which its kernel skips if a gradient is not finite: on all ranks or on none."""
        rate = optim.learning_rate(self.recipe.optim, step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.optim.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.contrast.parameters(), limit)
        skipped = norm.isfinite().logical_not()
        # GradScaler.step passes it to a fused optimiser the same way, but only for fp16 and without the norm.
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.ema:
            self.ema.update()
        self.scaler.update()
        level = self.scaler.scale(torch.ones_like(norm))
        fault = skipped & (level < 1) if self.scaler.is_enabled() else skipped
        self._faults += torch.stack([skipped, fault])

    @torch.no_grad()
    def _to_device(self, batch: Batch, past: bool) -> tuple[_Rows, Tensor]:
        """The rows on the device, and their waveforms as int16."""
        host = [torch.from_numpy(each) for each in (batch.wave_BS, batch.samples_B, batch.key_B, batch.group_B)]
        whole_BS, samples_B, key_B, group_B = self._copy(*host)
        if self.ranks.device.type == "cpu":
            # By numpy, in this thread alone: torch's threads would compete for cores with the threads that decode.
            wave_BS = torch.from_numpy(np.multiply(batch.wave_BS, np.float32(1 / 32768), dtype=np.float32))
        else:
            wave_BS = whole_BS.float() / 32768
        past_BS = add_effects(wave_BS, host[2], host[1], self.recipe.augment) if past else None
        return _Rows(wave_BS, past_BS, samples_B // self.model.hop_samples, key_B, group_B, None), whole_BS

    def _with_content(self, rows: _Rows, whole_BS: Tensor) -> _Rows:
        return replace(rows, content_BT=frame_content(whole_BS, whole_BS.shape[1] // self.model.hop_samples))

    def _pieces(self, rows: _Rows) -> Iterator[tuple[_Rows, bool]]:
        """(micro-batch, whether it is the last)."""
        count = len(rows.wave_BS)
        size = self.recipe.train.micro_batch or count
        for start in range(0, count, size):
            yield rows[start : start + size], start + size >= count

    def _reduce_with(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are reduced over ranks once a step, with the last piece."""
        if last or self.ranks.world == 1:
            return contextlib.nullcontext()
        return self._module.no_sync()  # type: ignore[operator]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)


def _backpropagate(outputs: NetworkOutput, gradients: NetworkOutput) -> None:
    """Backpropagates the gradients of the network's outputs to its parameters."""
    learnt = [number for number, output in enumerate(outputs) if output.requires_grad]
    torch.autograd.backward([outputs[number] for number in learnt], [gradients[number] for number in learnt])


def reduce_scores(result: StepResult, ranks: Ranks, *, counted: bool = True) -> dict[str, float]:
    """{loss, accuracy_mean, false_negative_rate, loss_k01, accuracy_k01, ...} of the global batch, on all ranks.

    `counted` says that `count_K` is global already, as in the result of a training step.
    """
    steps, sums = len(result.count_K), result.sums
    local = torch.cat([sums.loss_K.double(), sums.correct_K.double(), sums.false_K.double()])
    totals = ranks.sum(local).cpu().numpy()
    count_K = (result.count_K if counted else ranks.sum(result.count_K)).double().numpy()
    loss_K, accuracy_K, false_K = (part / np.maximum(1, count_K) for part in np.split(totals, 3))
    by_step = {f"loss_k{k + 1:02d}": float(loss_K[k]) for k in range(steps)}
    by_step |= {f"accuracy_k{k + 1:02d}": float(accuracy_K[k]) for k in range(steps)}
    means = {"loss": loss_K, "accuracy_mean": accuracy_K, "false_negative_rate": false_K}
    return {name: float(values.mean()) for name, values in means.items()} | by_step
