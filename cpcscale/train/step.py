"""One update: micro-batches forward and backward in the chosen precision, then the optimiser, alike on all ranks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC
from cpcscale.objective.infonce import InfoNCEConfig, Sums, counts, infonce
from cpcscale.stream.draft import Batch
from cpcscale.train import optim
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """Sums over this rank's rows, for each k (reduce them with `scores`), and what the global batch holds.

    `count_K` valid predictions, `samples` of audio that count, `bad` windows, whether the update was `skipped`, and
    whether that was for not being finite.
    """

    loss_K: Tensor
    correct_K: Tensor
    count_K: Tensor
    samples: int = 0
    bad: int = 0
    skipped: bool = False
    nonfinite: bool = False


class Contrast(nn.Module):
    """The network and its objective as one module, so that DDP sees one forward."""

    def __init__(self, model: CPC, config: InfoNCEConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, wave_BS: Tensor, frames_B: Tensor, key_B: Tensor) -> Sums:
        z_BTC, c_BTD = self.model.features(wave_BS)
        predictions_BTKC = self.model.predictor(c_BTD)
        # The scores and their softmax are in fp32 whatever the precision.
        with torch.autocast(wave_BS.device.type, enabled=False):
            return infonce(z_BTC, predictions_BTKC, frames_B, key_B, self.config)


class TrainStep:
    """Makes updates. Its state is the model, the optimiser and the loss scale.

    The loss is that of the global batch: counts follow from lengths alone and are summed over ranks before the forward
    pass, so each micro-batch's share of the loss is weighted right away and its gradients only ever add up.
    """

    def __init__(self, model: CPC, recipe: Recipe, ranks: Ranks) -> None:
        precision = recipe.train.precision
        if precision == "fp16" and ranks.device.type != "cuda":
            raise UserError("train.precision=fp16 needs a GPU and there is none here: use fp32, or bf16 to try it out")
        self.model, self.recipe, self.ranks = model, recipe, ranks
        self.optimizer = optim.build(model, recipe.optim)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16")
        self.module = ranks.wrapped(Contrast(model, recipe.objective))
        self._dtype = _DTYPES[precision]

    def __call__(self, batch: Batch, step: int) -> StepResult:
        """One update from this rank's rows of the global batch; skipped on all ranks when it is not finite."""
        wave_BS, frames_B, key_B = self._moved(batch)
        local = torch.tensor([batch.samples_B.sum(), len(batch.bad)], device=frames_B.device)
        totals = self.ranks.sum(torch.cat([counts(frames_B, self.recipe.model.predictor.steps), local]))
        count_K, (samples, bad) = totals[:-2], totals[-2:].tolist()
        weight_K = self.ranks.world / (count_K.clamp(min=1) * len(count_K))
        loss_K, correct_K = torch.zeros_like(weight_K), torch.zeros_like(count_K)
        self.optimizer.zero_grad(set_to_none=True)
        pieces = self._pieces(len(wave_BS))
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with self._gradients_stay(last), self._autocast():
                sums = self.module(wave_BS[piece], frames_B[piece], key_B[piece])
                self.scaler.scale((sums.loss_K * weight_K).sum()).backward()
            loss_K, correct_K = loss_K + sums.loss_K.detach(), correct_K + sums.correct_K
        # A global batch without one valid prediction has nothing to learn from, which is no fault.
        skipped = not bool(count_K.any())
        nonfinite = not skipped and not self._update(step)
        return StepResult(loss_K, correct_K, count_K, samples, bad, skipped or nonfinite, nonfinite)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepResult:
        """The same sums without an update; `count_K` is this rank's own."""
        wave_BS, frames_B, key_B = self._moved(batch)
        with self._autocast():
            contrast = Contrast(self.model, self.recipe.objective)
            sums = contrast(wave_BS, frames_B, key_B)
        return StepResult(sums.loss_K, sums.correct_K, counts(frames_B, len(sums.loss_K)))

    def _update(self, step: int) -> bool:
        """Whether all went well. Gradients are the same on all ranks here, and so is the answer.

        A step that fp16's loss scale gives up while it finds its level is its normal course, until it falls below 1.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate(self.recipe.optim, step)
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.optim.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        finite = bool(norm.isfinite())
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return finite or (self.scaler.is_enabled() and self.scaler.get_scale() >= 1)

    def _moved(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(float wave_BS in [-1, 1), int64 frames_B, int64 key_B) on the device; the wave travels as int16."""
        device = self.ranks.device
        wave_BS = torch.from_numpy(batch.wave_BS).to(device, non_blocking=True).float() / 32768
        frames_B = torch.from_numpy(batch.samples_B // self.model.hop_samples).to(device)
        return wave_BS, frames_B, torch.from_numpy(batch.key_B).to(device)

    def _pieces(self, rows: int) -> list[slice]:
        size = self.recipe.train.micro_batch or rows
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _gradients_stay(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are reduced once a step, with the last piece."""
        if last or self.ranks.world == 1:
            return contextlib.nullcontext()
        return self.module.no_sync()  # type: ignore[operator]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)


def scores(result: StepResult, ranks: Ranks, *, counted: bool = True) -> dict[str, float]:
    """{loss, accuracy_mean, loss_k01, accuracy_k01, ...} of the global batch, the same on every rank.

    `counted`: the counts are global already, as a training step's are.
    """
    steps = len(result.count_K)
    sums = ranks.sum(torch.cat([result.loss_K.double(), result.correct_K.double()])).cpu().numpy()
    count_K = (result.count_K if counted else ranks.sum(result.count_K)).double().cpu().numpy()
    loss_K, accuracy_K = (part / np.maximum(1, count_K) for part in (sums[:steps], sums[steps:]))
    by_step = {f"loss_k{k + 1:02d}": float(loss_K[k]) for k in range(steps)}
    by_step |= {f"accuracy_k{k + 1:02d}": float(accuracy_K[k]) for k in range(steps)}
    return {"loss": float(loss_K.mean()), "accuracy_mean": float(accuracy_K.mean()), **by_step}
