"""Trains one recogniser: Adam on the CCC loss of each whole batch; development speakers choose the epoch.

The loss is that of the whole batch, however it is split over micro-batches and ranks. If the batch does not fit in
memory at once, a first pass without graph makes all predictions and the gradient of the CCC by each; a second pass,
with the same dropout masks, takes each part of that gradient back through the network.

The result depends on the arguments and the seed alone. Shuffling has its own generator; dropout and the choice of
windows are keyed by (seed, epoch, utterance). So several fits can take turns epoch by epoch, as in a sweep, without
changing each other. Augmentation changes training inputs only. U utterances, B rows of a batch, P primitives.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale import audio, config
from cpcscale.emotion.audio.prefetch import read_ahead
from cpcscale.emotion.batching import (
    Utterance,
    derive_seed,
    epoch_batches,
    forward_by_length,
    predict,
    seeded,
    windows_of,
)
from cpcscale.emotion.heads.attention import EncoderWithHead
from cpcscale.emotion.scores.ccc import ccc
from cpcscale.errors import UserError
from cpcscale.objective.ccc import ccc_loss, ccc_loss_gradient
from cpcscale.objective.hash_random import bounded, hashed
from cpcscale.train.augment import EffectsConfig, add_effects
from cpcscale.train.ranks import Ranks

# Batches that are read before their turn.
_BATCHES_AHEAD = 4


class DivergedError(UserError):
    """The training loss is not finite."""


@dataclass(kw_only=True)
class FitAugmentConfig(EffectsConfig):
    """Augmentation of the waveforms on which an encoder and a recogniser are trained, drawn anew in each epoch."""

    PLACE: ClassVar[str] = "fit.augment"

    # augment training waveforms, if the encoder is trained; development and test audio stays as it is
    enabled: bool = False


@dataclass(kw_only=True)
class FitConfig:
    """How a recogniser is trained. The loss is 1 - a CCC_act - b CCC_val - g CCC_dom with g = 1 - a - b."""

    # passes over the training utterances, at most
    epochs: int = 50
    # utterances of a batch, over all ranks; the loss is the CCC of the whole batch, so its size changes the loss
    batch: int = 32
    # utterances of a rank whose graph is in memory at a time; 0: all. Never changes the gradient
    micro_batch: int = 0
    # learning rate of Adam, constant
    learning_rate: float = 2e-4
    # an L2 term in the gradient, as in the paper
    weight_decay: float = 1e-5
    # the gradient's largest norm; 0: no limit
    clip_norm: float = 0.0
    # a trained encoder's weights are updated from this epoch on, counted from 1; 0: from the start
    thaw_epoch: int = 0
    # after the epoch is chosen, train anew on training and development speakers for as many epochs
    refit: bool = field(default=False, metadata=config.ADDED)
    # stop after this many epochs without a better development CCC; 0: never
    patience: int = 0
    # a, the weight of activation in the loss
    activation_weight: float = 1 / 3
    # b, the weight of valence in the loss
    valence_weight: float = 1 / 3
    # augmentation of training waveforms; off in the paper's recipe
    augment: FitAugmentConfig = field(default_factory=FitAugmentConfig)
    # auto: a GPU if this process sees one
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        config.at_least(1, **{"fit.epochs": self.epochs})
        # One utterance has no CCC.
        config.at_least(2, **{"fit.batch": self.batch})
        rates = ("learning_rate", "weight_decay", "clip_norm", "activation_weight", "valence_weight")
        names = (*rates, "micro_batch", "thaw_epoch", "patience")
        config.at_least(0, **{f"fit.{name}": getattr(self, name) for name in names})
        if self.thaw_epoch > self.epochs:
            raise UserError(
                f"fit.thaw_epoch={self.thaw_epoch} is after the last epoch, fit.epochs={self.epochs}, so the encoder "
                "would never be trained: lower it, or use encoder.frozen=true"
            )
        if self.activation_weight + self.valence_weight > 1 + 1e-9:
            raise UserError(
                f"fit.activation_weight={self.activation_weight} and fit.valence_weight={self.valence_weight} add up "
                "to more than 1, and dominance gets the rest: lower one"
            )

    @property
    def weights(self) -> tuple[float, float, float]:
        """(a, b, g), with sum 1."""
        return (
            self.activation_weight,
            self.valence_weight,
            max(0.0, 1 - self.activation_weight - self.valence_weight),
        )


@dataclass(frozen=True)
class TrainingExamples:
    """The inputs and labels of U utterances.

    `inputs` are float32 features [T, C] or int16 waveforms [S] of each utterance, or a tuple of its windows. Threads
    read them batch by batch, so a sequence that decodes on access never has all of them in memory. `truth_UP` are the
    labels on [-1, 1]. `ids` name the utterances and key the random draws of each; by default their numbers. `shares`
    are the weights of an utterance's windows, see `predict`. Raises ValueError if these differ in length.
    """

    inputs: Sequence[Utterance]
    truth_UP: np.ndarray
    ids: Sequence[str] | None = None
    shares: Sequence[np.ndarray] | None = None

    def __post_init__(self) -> None:
        given = (each for each in (self.inputs, self.truth_UP, self.ids, self.shares) if each is not None)
        counts = {len(each) for each in given}
        if len(counts) > 1:
            raise ValueError(
                f"inputs, labels, ids and shares are for {sorted(counts)} utterances: give as many of each"
            )


@dataclass(frozen=True)
class EpochResult:
    """The figures of one epoch; `updates` and `best_dev_ccc` are since the start of training."""

    epoch: int
    updates: int
    train_loss: float
    dev_ccc: float
    best_dev_ccc: float


@dataclass(frozen=True)
class _Piece:
    """A micro-batch: the places of its rows in the batch, their inputs and dropout keys, on the CPU."""

    places: list[int]
    inputs: list[np.ndarray]
    key_B: Tensor


class HeadTraining:
    """The training of a network: each iteration trains one epoch and yields its EpochResult.

    It ends after the last epoch or when patience runs out; then `finish` gives the network of the best epoch. An epoch
    takes one window of each utterance. The network is called with (x, lengths_B, key_B) in training, where the keys are
    for dropout, and with (x, lengths_B) in evaluation. Raises DivergedError when the loss is not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        train: TrainingExamples,
        dev: TrainingExamples | None,
        settings: FitConfig,
        *,
        seed: int,
        epochs: int = 0,
        encoder_rate: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        """`epochs` instead of those of `settings`, if given; without `dev` the last one is the best.

        `encoder_rate` is the learning rate of the encoder of an EncoderWithHead.

        The `ranks` divide each batch; all of them make this object from the same arguments and iterate it together. The
        device is theirs. On several ranks, every parameter that requires a gradient must get one.
        """
        self.ranks = ranks or Ranks(0, 1, 1, fit_device(settings))
        self.device = self.ranks.device
        self.network = network.to(self.device)
        self.curve: list[EpochResult] = []
        self.best: EpochResult | None = None
        self._best_weights: dict[str, Tensor] = {}
        self._train, self._dev, self._settings, self._seed = train, dev, settings, seed
        self._epochs = epochs or settings.epochs
        names = range(len(train.inputs)) if train.ids is None else train.ids
        self._id_U = torch.tensor([derive_seed(0, f"utterance/{name}") for name in names])
        self._optimizer = torch.optim.Adam(
            _groups(network, settings.learning_rate, encoder_rate), weight_decay=settings.weight_decay
        )
        encoder = (
            network.encoder.parameters() if settings.thaw_epoch > 1 and isinstance(network, EncoderWithHead) else ()
        )
        self._frozen = [parameter for parameter in encoder if parameter.requires_grad]
        self._require_gradients(False)

    def __iter__(self) -> Iterator[EpochResult]:
        for number in range(len(self.curve) + 1, self._epochs + 1):
            if self._patience_is_over(number):
                return
            updates, train_loss = self._train_epoch(number)
            self._record(number, updates, train_loss, self._dev_ccc())
            yield self.curve[-1]

    def finish(self) -> nn.Module:
        """The network with the weights of the best epoch, in evaluation mode."""
        if self.best is not None:
            self.network.load_state_dict(self._best_weights)
        return self.network.eval()

    def _dev_ccc(self) -> float:
        if self._dev is None:
            return math.nan
        guess_UP = predict(self.network, self._dev.inputs, self.device, self.ranks, self._dev.shares)
        return float(ccc(self._dev.truth_UP, guess_UP).mean())

    def _train_epoch(self, number: int) -> tuple[int, float]:
        """Trains one epoch and returns (updates, mean loss)."""
        if self._frozen and number == self._settings.thaw_epoch:
            self._require_gradients(True)
        self.network.train()
        with seeded(self._seed, f"dropout/{number}", self.device):
            rows = epoch_batches(len(self._train.inputs), self._settings.batch, self._seed, number)
            # Threads read while the network trains: no batch depends on the one before.
            inputs = read_ahead(lambda each: (each, self._batch_inputs(each, number)), rows, _BATCHES_AHEAD)
            losses = [self._update(each, chosen, number) for each, chosen in inputs]
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise DivergedError(
                f"the loss is {mean} in epoch {number}: lower fit.learning_rate={self._settings.learning_rate} "
                "(or encoder.learning_rate, where the encoder is trained)"
            )
        return len(losses), mean

    def _require_gradients(self, required: bool) -> None:
        """For the encoder before thaw_epoch; DDP is made anew, as it knows only parameters that required one then."""
        for parameter in self._frozen:
            parameter.requires_grad_(required)
        self._module = self.ranks.wrap_ddp(self.network)

    def _own_places(self, rows: np.ndarray) -> list[int]:
        """The places in a batch that this rank computes."""
        return list(range(len(rows)))[self.ranks.rank :: self.ranks.world]

    def _batch_inputs(self, rows: np.ndarray, number: int) -> dict[int, np.ndarray]:
        """The window that this epoch takes of each of this rank's utterances, by the place in the batch."""
        window_B, augment_B = self._keys("window", rows, number), self._keys("augment", rows, number)
        inputs = {}
        # A rank without rows computes the first one in vain, because the others wait for its gradient.
        for place in self._own_places(rows) or [0]:
            choices = windows_of(self._train.inputs[rows[place]])
            window = choices[int(bounded(window_B[place], torch.tensor(len(choices))))]
            inputs[place] = self._augmented(window, augment_B[place]) if self._settings.augment.enabled else window
        return inputs

    def _augmented(self, wave_S: np.ndarray, drawn_by: Tensor) -> np.ndarray:
        """The augmented waveform, int16 [S]. Raises ValueError for features."""
        if wave_S.ndim != 1:
            raise ValueError("augmentation takes waveforms [S], and these are features [T, C]")
        wave_BS = torch.from_numpy(wave_S.astype(np.float32) / 32768)[None]
        changed_BS = add_effects(wave_BS, drawn_by[None], torch.tensor([len(wave_S)]), self._settings.augment)
        return audio.to_int16(changed_BS[0].numpy())

    def _keys(self, what: str, rows: np.ndarray, number: int) -> Tensor:
        """The random keys of these rows in an epoch; they depend on neither rank nor batch."""
        return hashed(torch.tensor(derive_seed(self._seed, f"{what}/{number}")), self._id_U[torch.from_numpy(rows)])

    def _update(self, rows: np.ndarray, inputs: dict[int, np.ndarray], number: int) -> Tensor:
        """One optimiser step on the batch of all ranks; returns its loss."""
        world, micro_batch = self.ranks.world, self._settings.micro_batch
        own = self._own_places(rows)
        # By the largest share of any rank, because all ranks must make the same number of passes.
        once = not 0 < micro_batch < -(-len(rows) // world)
        pieces = self._pieces(rows, inputs, number)
        made = [self._forward(piece, graph=once) for piece in pieces]
        truth_BP = torch.from_numpy(self._train.truth_UP[rows]).to(self.device)
        guess_BP = torch.zeros_like(truth_BP, dtype=torch.float64)
        for piece, guess in zip(pieces, made, strict=True):
            guess_BP[piece.places] = guess.detach().double() * bool(own)
        guess_BP = self.ranks.sum(guess_BP)
        # DDP divides the sum over ranks by their number.
        gradient_BP = ccc_loss_gradient(guess_BP, truth_BP, self._settings.weights) * (world if own else 0)
        self._optimizer.zero_grad(set_to_none=True)
        for place, (piece, guess) in enumerate(zip(pieces, made, strict=True)):
            with self._gradient_sync(last=place == len(pieces) - 1):
                again = guess if once else self._forward(piece, graph=True)
                again.backward(gradient_BP[piece.places].to(again.dtype))
        if self._settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._settings.clip_norm)
        self._optimizer.step()
        return ccc_loss(guess_BP, truth_BP, self._settings.weights)

    def _pieces(self, rows: np.ndarray, inputs: dict[int, np.ndarray], number: int) -> list[_Piece]:
        """The batch in micro-batches of like length."""
        dropout_B = self._keys("dropout", rows, number)
        order = sorted(inputs, key=lambda place: len(inputs[place]))
        size = self._settings.micro_batch or len(order)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        return [_Piece(part, [inputs[place] for place in part], dropout_B[part]) for part in parts]

    def _forward(self, piece: _Piece, *, graph: bool) -> Tensor:
        with torch.set_grad_enabled(graph):
            return forward_by_length(self._module if graph else self.network, piece.inputs, self.device, piece.key_B)

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks exchange gradients once a batch: in the backward pass of the last piece."""
        if last or self.ranks.world == 1:
            return contextlib.nullcontext()
        return self._module.no_sync()  # type: ignore[operator]

    def _record(self, number: int, updates: int, train_loss: float, dev_ccc: float) -> None:
        done = self.curve[-1].updates if self.curve else 0
        better = self.best is None or self._dev is None or dev_ccc > self.best.dev_ccc
        best_dev_ccc = dev_ccc if better or self.best is None else self.best.dev_ccc
        self.curve.append(EpochResult(number, done + updates, train_loss, dev_ccc, best_dev_ccc))
        if better:
            self.best = self.curve[-1]
            # Copies: the state dict itself refers to the weights that the next epoch changes.
            self._best_weights = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def _patience_is_over(self, number: int) -> bool:
        patience = self._settings.patience
        if not patience or self.best is None:
            return False
        # While the encoder is frozen, patience counts from its first trained epoch.
        since = max(self.best.epoch, self._settings.thaw_epoch - 1) if self._frozen else self.best.epoch
        return number - since > patience


def fit_device(settings: FitConfig) -> torch.device:
    """The device of a fit. Raises UserError for fit.device=cuda in a process without a GPU."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("fit.device=cuda, but this process sees no GPU: use fit.device=auto or cpu")
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _groups(network: nn.Module, rate: float, encoder_rate: float) -> list[dict[str, object]]:
    if not isinstance(network, EncoderWithHead):
        return [{"params": list(network.parameters()), "lr": rate}]
    return [
        {"params": list(network.recogniser.parameters()), "lr": rate},
        {"params": list(network.encoder.parameters()), "lr": encoder_rate},
    ]
