"""One update: micro-batches forward and backward in the chosen precision, then the optimiser, the same on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale.errors import UserError
from cpcscale.model.cpc import CPC
from cpcscale.objective import objectives
from cpcscale.objective.infonce import frame_content
from cpcscale.objective.objective import Features, Objective, Outputs, Rows
from cpcscale.stream.batch import Batch
from cpcscale.train import optim
from cpcscale.train.augment import add_effects
from cpcscale.train.device import DeviceCopies, Timeline, make_timeline
from cpcscale.train.ema import Ema
from cpcscale.train.ranks import Ranks
from cpcscale.train.recipe import Recipe
from cpcscale.train.scores import ObjectiveSums, StepResult, factor

# The outputs of each head.
NetworkOutput = tuple[Outputs, ...]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ContrastiveModel(nn.Module):
    """The network and the heads of the objectives as one module, as DDP needs: from waveforms to what is compared."""

    def __init__(self, model: CPC, objectives: Sequence[Objective], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = {objective.name: objective.head(model.channels, model.context_width) for objective in objectives}
        # Before the network: checkpoints know the optimiser's state by the number of each parameter.
        self.heads, self.model = nn.ModuleDict(heads), model
        self.to(model.gain.device)

    def forward(self, wave_BS: Tensor, past_BS: Tensor | None, rows: Rows) -> NetworkOutput:
        """The outputs of each head, in fp32, of float waveforms in [-1, 1).

        Contexts are computed from `past_BS` if given, else from `wave_BS`.
        """
        z_BTC, c_BTD = self.model.features(wave_BS, past_BS)
        features = Features(z_BTC, c_BTD, self.model.predictor(c_BTD))
        with torch.autocast(wave_BS.device.type, enabled=False):
            return tuple(head(features, rows) for head in self.heads.values())


@dataclass(frozen=True)
class _Piece:
    """Rows of a batch on the device: float waveforms in [-1, 1), `past_BS` augmented, if any."""

    wave_BS: Tensor
    past_BS: Tensor | None
    rows: Rows

    def __getitem__(self, piece: slice) -> _Piece:
        past_BS = None if self.past_BS is None else self.past_BS[piece]
        return _Piece(self.wave_BS[piece], past_BS, self.rows[piece])


class _TimedRanks:
    """The ranks as objectives see them: the time of an exchange is counted as that, the rest as the objective's."""

    def __init__(self, ranks: Ranks, timeline: Timeline) -> None:
        self._ranks, self._timeline = ranks, timeline

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, slice]:
        self._timeline.mark("objective")
        gathered = self._ranks.gather_rows(rows)
        self._timeline.mark("allreduce")
        return gathered

    def sum(self, values: Tensor) -> Tensor:
        self._timeline.mark("objective")
        total = self._ranks.sum(values)
        self._timeline.mark("allreduce")
        return total


class TrainStep:
    """Makes the `total` updates of a run. Its state is the model, the optimiser, the loss scale and the mean weights.

    The loss is that of objective/objective.py over the global batch. The counts of valid elements depend only on the
    batch and are summed over ranks before the forward pass, so each micro-batch's loss has its final weight at once and
    gradients just add up. If an objective compares rows, the outputs of all rows are computed first and the loss
    gradient with respect to them is cached; then each micro-batch runs forward again and backward (Gao et al. 2021,
    arXiv 2101.06983). Accumulation therefore does not change the loss.

    The host never waits for a GPU here: it sums over ranks itself what it needs to know. Whether an update was finite
    is decided and counted on the device; `faults` reads it on steps that are logged anyway.
    """

    def __init__(self, model: CPC, recipe: Recipe, ranks: Ranks, total: int) -> None:
        precision = recipe.train.precision
        if precision == "fp16" and ranks.device.type != "cuda":
            raise UserError("train.precision=fp16 needs a GPU and there is none here: use fp32, or bf16 to try it out")
        self.model, self.recipe, self.ranks, self.total = model, recipe, ranks, total
        self.objectives = objectives.chosen(recipe.objective, recipe.model.predictor.steps)
        self.contrast = ContrastiveModel(model, self.objectives, recipe.seed)
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
        facts = _facts(batch, self.model.hop_samples)
        whole, int_BS = self._to_device(batch, facts, past=self.recipe.augment.past)
        self.timeline.mark("copy")
        counts, (samples, bad, request) = self._global_counts(batch, facts, request if self.ranks.first else 0)
        weights = self._copy(*map(self._class_weights, self.objectives, counts))
        weights = tuple(map(self.scaler.scale, weights))
        self.timeline.mark("allreduce")
        asked, self._request = request != self._request, request
        scored = scored or asked
        whole = self._with_content(whole, int_BS) if scored else whole
        self.optimizer.zero_grad(set_to_none=True)
        compares = any(objective.compares_rows for objective in self.objectives)
        by_piece = list(self._together(whole, weights) if compares else self._piece_by_piece(whole, weights))
        sums = [torch.stack(parts).sum(0) for parts in zip(*by_piece, strict=True)]
        parts = tuple(map(ObjectiveSums, self.objectives, sums, counts))
        result = StepResult(parts, samples, bad, request, asked, scored)
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
    def evaluate(self, batch: Batch) -> list[ObjectiveSums]:
        """The sums over a batch without an update, and this rank's own counts, of objectives that score single rows.

        For InfoNCE, negatives are always drawn for each prediction from its own utterance, whatever the run trains
        with, so that scores do not depend on how rows are shared out and are comparable between runs.
        """
        facts = _facts(batch, self.model.hop_samples)
        piece = self._with_content(*self._to_device(batch, facts, past=False))
        with self._autocast():
            outputs = self.contrast(piece.wave_BS, None, piece.rows)
        found = []
        for objective, each in zip(self.objectives, outputs, strict=True):
            if score := objective.by_row():
                sums_MN, _ = score(each, piece.rows, self.ranks)
                found.append(ObjectiveSums(score, sums_MN, score.count(facts, self.ranks)))
        return found

    def _global_counts(self, batch: Batch, facts: Rows, request: int) -> tuple[list[Tensor], list[int]]:
        """(count_N of each objective, [samples, bad windows, request]) of all ranks' rows, on the CPU."""
        counts = [objective.count(facts, self.ranks) for objective in self.objectives]
        local = torch.tensor([int(batch.samples_B.sum()), len(batch.bad), request])
        totals = self.ranks.sum(torch.cat([*counts, local]))
        *counts, local = totals.split([*map(len, counts), len(local)])
        return counts, local.tolist()

    def _class_weights(self, objective: Objective, count_N: Tensor) -> Tensor:
        """What the sums of each class are multiplied by; DDP averages the gradients over the ranks."""
        weight_N = self.ranks.world / (count_N.clamp(min=1) * len(count_N))
        return weight_N * factor(objective, self.objectives[0])

    def _piece_by_piece(self, whole: _Piece, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Forward and backward of one micro-batch after the other."""
        for piece, last in self._pieces(whole):
            with self._reduce_with(last):
                outputs = self._run_network(piece, graph=True)
                self.timeline.mark("forward")
                sums, gradients = self._losses(outputs, piece.rows, weights)
                self.timeline.mark("objective")
                _backpropagate(outputs, gradients)
            self.timeline.mark("backward")
            yield sums

    def _together(self, whole: _Piece, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Forward and backward where rows are compared with those of all ranks and micro-batches (see the class)."""
        pieces, once = list(self._pieces(whole)), self._is_one_piece()
        by_piece = [self._run_network(piece, graph=once) for piece, _ in pieces]
        outputs = tuple(tuple(map(_joined, zip(*parts, strict=True))) for parts in zip(*by_piece, strict=True))
        self.timeline.mark("forward")
        sums, gradients = self._losses(outputs, whole.rows, weights)
        self.timeline.mark("objective")
        start = 0
        for (piece, last), kept in zip(pieces, by_piece, strict=True):
            part = slice(start, start + len(piece.wave_BS))
            with self._reduce_with(last):
                again = kept if once else self._run_network(piece, graph=True)
                _backpropagate(again, [[_of_piece(each, part, last) for each in parts] for parts in gradients])
            start = part.stop
        self.timeline.mark("backward")
        yield sums

    def _losses(
        self, outputs: NetworkOutput, rows: Rows, weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Outputs]]:
        """(sums, gradients of the outputs) of each objective."""
        peers, sums, gradients = _TimedRanks(self.ranks, self.timeline), [], []
        for objective, each, weight_N in zip(self.objectives, outputs, weights, strict=True):
            sums_MN, back = objective(tuple(output.detach() for output in each), rows, peers, weight_N)
            assert back is not None
            sums.append(sums_MN)
            gradients.append(back)
        return sums, gradients

    def _is_one_piece(self) -> bool:
        """Whether all rows of every rank fit one micro-batch. The same on all ranks, whose collectives must match."""
        train = self.recipe.train
        most = -(-train.lanes // self.ranks.world) * (train.batch // train.lanes)
        return not 0 < train.micro_batch < most

    def _run_network(self, piece: _Piece, *, graph: bool) -> NetworkOutput:
        module = self._module if graph else self.contrast
        with torch.set_grad_enabled(graph), self._autocast():
            return cast(NetworkOutput, module(piece.wave_BS, piece.past_BS, piece.rows))

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
    def _to_device(self, batch: Batch, facts: Rows, past: bool) -> tuple[_Piece, Tensor]:
        """The rows on the device, and their waveforms as int16."""
        known = {name: tensor for name, tensor in vars(facts).items() if tensor is not None}
        int_BS, *moved = self._copy(torch.from_numpy(batch.wave_BS), *known.values())
        rows = Rows(**dict(zip(known, moved, strict=True)))
        if self.ranks.device.type == "cpu":
            # By numpy, in this thread alone: torch's threads would compete for cores with the threads that decode.
            wave_BS = torch.from_numpy(np.multiply(batch.wave_BS, np.float32(1 / 32768), dtype=np.float32))
        else:
            wave_BS = int_BS.float() / 32768
        samples_B = torch.from_numpy(batch.samples_B)
        past_BS = add_effects(wave_BS, facts.key_B, samples_B, self.recipe.augment) if past else None
        return _Piece(wave_BS, past_BS, rows), int_BS

    def _with_content(self, piece: _Piece, int_BS: Tensor) -> _Piece:
        content_BT = frame_content(int_BS, int_BS.shape[1] // self.model.hop_samples)
        return replace(piece, rows=replace(piece.rows, content_BT=content_BT))

    def _pieces(self, whole: _Piece) -> Iterator[tuple[_Piece, bool]]:
        """(micro-batch, whether it is the last)."""
        count = len(whole.wave_BS)
        size = self.recipe.train.micro_batch or count
        for start in range(0, count, size):
            yield whole[start : start + size], start + size >= count

    def _reduce_with(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are reduced over ranks once a step, with the last piece."""
        if last or self.ranks.world == 1:
            return contextlib.nullcontext()
        return self._module.no_sync()  # type: ignore[operator]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)


def _facts(batch: Batch, hop_samples: int) -> Rows:
    """What is known of the rows of a batch, on the CPU."""
    host = torch.from_numpy
    known = host(batch.samples_B // hop_samples), host(batch.key_B), host(batch.group_B), host(batch.utterance_B)
    if batch.frame_BTF is None or batch.window_BF is None:
        return Rows(*known)
    return Rows(*known, None, host(batch.frame_BTF), host(batch.window_BF))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all micro-batches; what rows share is the same in each."""
    return torch.cat(list(parts)) if parts[0].dim() else parts[0]


def _of_piece(gradient: Tensor, part: slice, last: bool) -> Tensor:
    """The gradient of a micro-batch: of its rows; of what all rows share, once."""
    if gradient.dim():
        return gradient[part]
    return gradient if last else torch.zeros_like(gradient)


def _backpropagate(outputs: NetworkOutput, gradients: Sequence[Sequence[Tensor]]) -> None:
    """Backpropagates the gradients of the heads' outputs to the parameters."""
    pairs = [pair for each in zip(outputs, gradients, strict=True) for pair in zip(*each, strict=True)]
    learnt = [(output, gradient) for output, gradient in pairs if output.requires_grad]
    torch.autograd.backward([output for output, _ in learnt], [gradient for _, gradient in learnt])
