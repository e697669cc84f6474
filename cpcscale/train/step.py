"""One update: micro-batches forward and backward in the chosen precision, then the optimiser, alike on all ranks."""

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
    added,
    comparable,
    content,
    counts,
    infonce,
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
    """Sums over this rank's rows, for each k (reduce them with `reduce_scores`), and what the global batch holds.

    `sums` of the objective, `count_K` valid predictions (on the CPU), `samples` of audio that count, `bad` windows,
    rank 0's `request` and whether it `asked` for something new, and whether the step was `scored`. All but the sums is
    known to the host, whatever the device still has to do.
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
        """Whether there was nothing to learn from: no valid prediction in the global batch, so no update."""
        return not any(self.count_K.tolist())


class ContrastiveModel(nn.Module):
    """wave_BS -> what the objective compares: the network and the scale of scores as one module, as DDP needs."""

    def __init__(self, model: CPC, config: InfoNCEConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        # As a logarithm, so that what is learnt stays above 0.
        log_scale = torch.tensor(math.log(config.scale(model.channels)))
        if config.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        self.to(model.gain.device)

    def forward(self, wave_BS: Tensor, past_BS: Tensor | None = None) -> NetworkOutput:
        """`past_BS` is what contexts hear, where that is not the wave itself."""
        z_BTC, c_BTD = self.model.features(wave_BS, past_BS)
        predictions_BTKC = self.model.predictor(c_BTD)
        with torch.autocast(wave_BS.device.type, enabled=False):
            return *comparable(z_BTC, predictions_BTKC, self.config), self.log_scale.exp()


@dataclass(frozen=True)
class _Rows:
    """Rows of a batch on the device: float waves in [-1, 1), int64 the rest.

    `past_BS` is the augmented wave, where there is one; `content_BT` what frames hold, when scores are wanted.
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

    def latents(self, made: NetworkOutput) -> ScoredRows:
        """These rows for the objective, cut off from the graph."""
        z_BTC, predictions_BTKC, scale = (part.detach() for part in made)
        return ScoredRows(z_BTC, predictions_BTKC, scale, self.frames_B, self.key_B, self.content_BT)


class TrainStep:
    """Makes the `total` updates of a run. Its state is the model, the optimiser, the loss scale and the mean weights.

    The loss is that of the global batch: counts follow from lengths alone and are summed over ranks before the forward
    pass, so each micro-batch's share of the loss is weighted right away and its gradients only ever add up. Where
    negatives come from other rows than a prediction's own, all latents of the global batch are made first and the
    objective's gradient with respect to them is cached; then each micro-batch is pushed through once more and back
    (Gao et al. 2021, arXiv 2101.06983), so that accumulation changes nothing.

    The host never waits for a GPU here: what it has to know it sums over ranks itself, and whether an update was
    finite is decided and counted on the device, to be read with `faults` where something is logged anyway.
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
        self._moving, self._faults = DeviceCopies(ranks.device), torch.zeros(2, dtype=torch.int64, device=ranks.device)
        # Updates mark what they do: copy, allreduce, forward, objective, backward, optimiser.
        self.timeline = make_timeline(ranks.device)

    def __call__(self, batch: Batch, step: int, *, scored: bool = True, request: int = 0) -> StepResult:
        """One update from this rank's rows of the global batch; skipped on all ranks when it is not finite.

        Correct predictions and false negatives are counted when the step is `scored`. The `request` of rank 0 comes out
        on every rank; a step that brings another one than the last is scored too.
        """
        self.timeline.mark("unattributed")
        rows, whole_BS = self._moved(batch, past=self.recipe.augment.past)
        self.timeline.mark("copy")
        count_K, (samples, bad, request) = self._counted(batch, request if self.ranks.first else 0)
        self.timeline.mark("allreduce")
        asked, self._request = request != self._request, request
        scored = scored or asked
        rows = self._with_content(rows, whole_BS) if scored else rows
        (weight_K,) = self._moving(self.ranks.world / (count_K.clamp(min=1) * len(count_K)))
        weight_K = self.scaler.scale(weight_K)
        self.optimizer.zero_grad(set_to_none=True)
        own = self.recipe.objective.scope == "utterance"
        sums = added(self._by_pieces(rows, weight_K) if own else self._by_pool(rows, weight_K))
        result = StepResult(sums, count_K, samples, bad, request, asked, scored)
        if not result.empty:
            self._update(step)
        self.timeline.mark("optimiser")
        return result

    def faults(self) -> tuple[int, int]:
        """(updates skipped, those of them that no precision should have) since this was last asked; waits for a GPU.

        A step that fp16's loss scale gives up while it finds its level is its normal course, until it falls below 1.
        """
        skipped, nonfinite = self._faults.tolist()
        self._faults.zero_()
        return skipped, nonfinite

    def exchange_s(self) -> tuple[float, float]:
        """Seconds so far of the gradients' exchange between ranks, and those that no backward pass covered."""
        return self.ranks.exchange_s(self._module)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the network has the weights that are scored: their running mean, where there is one."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepResult:
        """The sums without an update; `count_K` is this rank's own.

        Negatives are each prediction's own and from its utterance, whatever the run trains with, so that scores do not
        depend on how rows are shared and runs compare.
        """
        rows = self._with_content(*self._moved(batch, past=False))
        with self._autocast():
            latents = rows.latents(self.contrast(rows.wave_BS))
        sums, _ = infonce(latents, replace(self.recipe.objective, scope="utterance", draw="each"))
        return StepResult(sums, self._counts(batch))

    def _counts(self, batch: Batch) -> Tensor:
        frames_B = torch.from_numpy(batch.samples_B // self.model.hop_samples)
        return counts(frames_B, self.recipe.model.predictor.steps)

    def _counted(self, batch: Batch, request: int) -> tuple[Tensor, list[int]]:
        """(count_K, [samples, bad windows, request]) of all ranks' rows."""
        local = torch.tensor([int(batch.samples_B.sum()), len(batch.bad), request])
        totals = self.ranks.sum(torch.cat([self._counts(batch), local]))
        return totals[:-3], totals[-3:].tolist()

    def _by_pieces(self, rows: _Rows, weight_K: Tensor) -> Iterator[LossSums]:
        """Forward and backward of one micro-batch after the other, each row drawing from itself."""
        for piece, last in self._pieces(rows):
            with self._gradients_stay(last):
                with self._autocast():
                    made = self._module(piece.wave_BS, piece.past_BS)
                self.timeline.mark("forward")
                sums, gradients = infonce(piece.latents(made), self.recipe.objective, weight_K=weight_K)
                self.timeline.mark("objective")
                assert gradients is not None
                _back(made, (gradients.z_BTC, gradients.predictions_BTKC, gradients.scale))
            self.timeline.mark("backward")
            yield sums

    def _by_pool(self, rows: _Rows, weight_K: Tensor) -> Iterator[LossSums]:
        """The same with negatives from the rows of all ranks and micro-batches."""
        pieces, once = list(self._pieces(rows)), self._at_once()
        made = [self._made(piece, graph=once) for piece, _ in pieces]
        whole = torch.cat([z_BTC for z_BTC, _, _ in made]), torch.cat([p_BTKC for _, p_BTKC, _ in made]), made[0][2]
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
        for (piece, last), kept in zip(pieces, made, strict=True):
            part = slice(start, start + len(piece.wave_BS))
            with self._gradients_stay(last):
                again = kept if once else self._made(piece, graph=True)
                # The scale is one for all pieces.
                scale = gradients.scale if last else torch.zeros_like(gradients.scale)
                _back(again, (gradients.z_BTC[part], gradients.predictions_BTKC[part], scale))
            start = part.stop
        self.timeline.mark("backward")
        yield sums

    def _at_once(self) -> bool:
        """Whether all rows of every rank are one micro-batch: all ranks agree, whose collectives must meet."""
        train = self.recipe.train
        most = -(-train.lanes // self.ranks.world) * (train.batch // train.lanes)
        return not 0 < train.micro_batch < most

    def _made(self, piece: _Rows, *, graph: bool) -> NetworkOutput:
        with torch.set_grad_enabled(graph), self._autocast():
            return cast(NetworkOutput, (self._module if graph else self.contrast)(piece.wave_BS, piece.past_BS))

    def _pool(self, rows: _Rows, z_BTC: Tensor) -> tuple[NegativePool, slice]:
        """The latents of the global batch, and which of its rows are this rank's."""
        label_B = rows.group_B if self.recipe.objective.scope == "group" else torch.zeros_like(rows.group_B)
        frames_R, own = self.ranks.gather_rows(rows.frames_B)
        z_RTC, key_R, label_R = (self.ranks.gather_rows(part)[0] for part in (z_BTC, rows.key_B, label_B))
        content_RT = None if rows.content_BT is None else self.ranks.gather_rows(rows.content_BT)[0]
        return NegativePool(z_RTC, Scope.of_pool(frames_R, key_R, label_R, z_BTC.shape[1], own), content_RT), own

    def _update(self, step: int) -> None:
        """The optimiser's step, which its kernel leaves out where the gradient is not finite: on all ranks, whose
        gradients are the same here."""
        rate = optim.learning_rate(self.recipe.optim, step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.optim.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.contrast.parameters(), limit)
        skipped = norm.isfinite().logical_not()
        # As GradScaler.step tells a fused optimiser; that method knows nothing of fp32 and bf16, nor of the norm.
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.ema:
            self.ema.update()
        self.scaler.update()
        level = self.scaler.scale(torch.ones_like(norm))
        fault = skipped & (level < 1) if self.scaler.is_enabled() else skipped
        self._faults += torch.stack([skipped, fault])

    @torch.no_grad()
    def _moved(self, batch: Batch, past: bool) -> tuple[_Rows, Tensor]:
        """The rows on the device, and the wave as it travels: int16."""
        host = [torch.from_numpy(each) for each in (batch.wave_BS, batch.samples_B, batch.key_B, batch.group_B)]
        whole_BS, samples_B, key_B, group_B = self._moving(*host)
        if self.ranks.device.type == "cpu":
            # By this thread alone, as numpy does: torch's threads would wait for the cores of those that decode.
            wave_BS = torch.from_numpy(np.multiply(batch.wave_BS, np.float32(1 / 32768), dtype=np.float32))
        else:
            wave_BS = whole_BS.float() / 32768
        past_BS = add_effects(wave_BS, host[2], host[1], self.recipe.augment) if past else None
        return _Rows(wave_BS, past_BS, samples_B // self.model.hop_samples, key_B, group_B, None), whole_BS

    def _with_content(self, rows: _Rows, whole_BS: Tensor) -> _Rows:
        return replace(rows, content_BT=content(whole_BS, whole_BS.shape[1] // self.model.hop_samples))

    def _pieces(self, rows: _Rows) -> Iterator[tuple[_Rows, bool]]:
        """(micro-batch, whether it is the last)."""
        count = len(rows.wave_BS)
        size = self.recipe.train.micro_batch or count
        for start in range(0, count, size):
            yield rows[start : start + size], start + size >= count

    def _gradients_stay(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are reduced once a step, with the last piece."""
        if last or self.ranks.world == 1:
            return contextlib.nullcontext()
        return self._module.no_sync()  # type: ignore[operator]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)


def _back(made: NetworkOutput, gradients: NetworkOutput) -> None:
    """Takes the gradients of what a forward made back to the parameters."""
    learnt = [number for number, output in enumerate(made) if output.requires_grad]
    torch.autograd.backward([made[number] for number in learnt], [gradients[number] for number in learnt])


def reduce_scores(result: StepResult, ranks: Ranks, *, counted: bool = True) -> dict[str, float]:
    """{loss, accuracy_mean, false_negative_rate, loss_k01, accuracy_k01, ...} of the global batch, alike on all ranks.

    `counted`: the counts are global already, as a training step's are.
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
