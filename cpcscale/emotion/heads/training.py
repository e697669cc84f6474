"""Training one recogniser: Adam on the CCC loss of each whole batch, the epoch chosen on development speakers.

The loss is that of the batch however it is split over micro-batches and ranks. Where not all of it fits at once, a
first pass without graph makes every prediction, the CCC and its gradient by each prediction follow from all of them,
and a second pass takes each part of that gradient back through the network, under the dropout masks of the first.

The whole of it is a function of its arguments and the seed. Shuffling has a generator of its own, and dropout and the
choice of windows are keyed by (seed, epoch, utterance), so several fits may take turns epoch by epoch, as a sweep has
them do, without touching each other. Augmentation, where there is any, changes what is trained on and nothing that is
scored. U utterances, B rows of a batch, P primitives.
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
from cpcscale.emotion.batching import Utterance, batches, by_length, key, predict, seeded, windows
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
    """A loss that is not finite."""


@dataclass(kw_only=True)
class FitAugmentConfig(EffectsConfig):
    """What a recogniser that is trained on waveforms hears otherwise than it was, drawn anew in each epoch."""

    PLACE: ClassVar[str] = "fit.augment"

    enabled: bool = False  # of an encoder that is trained; what is scored stays as it is


@dataclass(kw_only=True)
class FitConfig:
    """How a recogniser is trained. The loss is 1 - a CCC_act - b CCC_val - g CCC_dom with g = 1 - a - b."""

    epochs: int = 50  # passes over the training utterances, at most
    batch: int = 32  # utterances, over all ranks; the CCC is that of the whole batch, so it is part of the loss
    micro_batch: int = 0  # utterances of a rank whose graph is in memory at a time; 0: all. Never changes the gradient
    learning_rate: float = 2e-4  # of Adam, constant
    weight_decay: float = 1e-5  # an L2 term in the gradient, as in the paper
    clip_norm: float = 0.0  # the gradient's largest norm; 0: any
    thaw_epoch: int = 0  # a trained encoder's weights move from this epoch on, counted from 1; 0: from the start
    patience: int = 0  # epochs without a better development CCC before it stops; 0: never
    activation_weight: float = 1 / 3  # a
    valence_weight: float = 1 / 3  # b
    augment: FitAugmentConfig = field(default_factory=FitAugmentConfig)  # off in the paper's recipe
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU when this process has one

    def __post_init__(self) -> None:
        config.at_least(1, **{"fit.epochs": self.epochs})
        # One utterance has no CCC.
        config.at_least(2, **{"fit.batch": self.batch})
        rates = ("learning_rate", "weight_decay", "clip_norm", "activation_weight", "valence_weight")
        names = (*rates, "micro_batch", "thaw_epoch", "patience")
        config.at_least(0, **{f"fit.{name}": getattr(self, name) for name in names})
        if self.thaw_epoch > self.epochs:
            raise UserError(
                f"fit.thaw_epoch={self.thaw_epoch} is after the last one, fit.epochs={self.epochs}: the encoder would "
                "never move; lower it, or train with encoder.frozen=true"
            )
        if self.activation_weight + self.valence_weight > 1 + 1e-9:
            raise UserError(
                f"fit.activation_weight={self.activation_weight} and fit.valence_weight={self.valence_weight} add up "
                "to more than 1, and dominance gets the rest: lower one"
            )

    @property
    def weights(self) -> tuple[float, float, float]:
        """(a, b, g), adding up to 1."""
        return (
            self.activation_weight,
            self.valence_weight,
            max(0.0, 1 - self.activation_weight - self.valence_weight),
        )


@dataclass(frozen=True)
class TrainingExamples:
    """Utterances as a network takes them, and what it should say.

    `inputs` are float32 features [T, C] or int16 waveforms [S], an utterance's one or a tuple of its windows. They are
    taken for a batch at a time, by threads: a sequence that reads or decodes them then is never in memory as a whole.
    `truth_UP` the labels on [-1, 1]; `ids` name the utterances and key what is random about each: by default their
    numbers. `shares` weighs the windows in what is said of an utterance, see `predict`. Raises ValueError where these
    are not of one length.
    """

    inputs: Sequence[Utterance]
    truth_UP: np.ndarray
    ids: Sequence[str] | None = None
    shares: Sequence[np.ndarray] | None = None

    def __post_init__(self) -> None:
        given = (each for each in (self.inputs, self.truth_UP, self.ids, self.shares) if each is not None)
        counts = {len(each) for each in given}
        if len(counts) > 1:
            raise ValueError(f"inputs, labels, ids and shares are of {sorted(counts)} utterances: give one of each")


@dataclass(frozen=True)
class EpochResult:
    """What one pass over the training part came to; `updates` and `best_dev_ccc` are since the start."""

    epoch: int
    updates: int
    train_loss: float
    dev_ccc: float
    best_dev_ccc: float


@dataclass(frozen=True)
class _Piece:
    """Rows whose graph is made at once: their places in the batch, inputs and keys, on the CPU."""

    places: list[int]
    inputs: list[np.ndarray]
    key_B: Tensor


class HeadTraining:
    """Iterating trains, one Epoch a pass, until the last or until patience ends; `finish` gives the best epoch's net.

    An epoch hears one window of each utterance. A network takes (x, lengths_B, key_B) in training, where the keys are
    those of its dropout, and (x, lengths_B) in evaluation. Raises DivergedError when the loss is not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        train: TrainingExamples,
        dev: TrainingExamples,
        settings: FitConfig,
        *,
        seed: int,
        encoder_rate: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        """`encoder_rate` is the learning rate of the CPC part of an EndToEnd network.

        The `ranks` share each batch; all of them make the same fit from the same arguments and iterate it together.
        On several, theirs is the device, and every parameter that requires a gradient must get one.
        """
        self.ranks = ranks or Ranks(0, 1, 1, device(settings))
        self.device = self.ranks.device
        self.network = network.to(self.device)
        self.curve: list[EpochResult] = []
        self.best: EpochResult | None = None
        self._best_weights: dict[str, Tensor] = {}
        self._train, self._dev, self._settings, self._seed = train, dev, settings, seed
        names = range(len(train.inputs)) if train.ids is None else train.ids
        self._id_U = torch.tensor([key(0, f"utterance/{name}") for name in names])
        self._optimizer = torch.optim.Adam(
            _groups(network, settings.learning_rate, encoder_rate), weight_decay=settings.weight_decay
        )
        encoder = (
            network.encoder.parameters() if settings.thaw_epoch > 1 and isinstance(network, EncoderWithHead) else ()
        )
        self._frozen = [parameter for parameter in encoder if parameter.requires_grad]
        self._require_gradients(False)

    def __iter__(self) -> Iterator[EpochResult]:
        for number in range(len(self.curve) + 1, self._settings.epochs + 1):
            if self._patience_is_over(number):
                return
            updates, train_loss = self._pass(number)
            guess_UP = predict(self.network, self._dev.inputs, self.device, self.ranks, self._dev.shares)
            self._keep(number, updates, train_loss, float(ccc(self._dev.truth_UP, guess_UP).mean()))
            yield self.curve[-1]

    def finish(self) -> nn.Module:
        """The network with the weights of the best epoch, in evaluation mode."""
        if self.best is not None:
            self.network.load_state_dict(self._best_weights)
        return self.network.eval()

    def _pass(self, number: int) -> tuple[int, float]:
        """One epoch of updates: (how many, mean loss)."""
        if self._frozen and number == self._settings.thaw_epoch:
            self._require_gradients(True)
        self.network.train()
        with seeded(self._seed, f"dropout/{number}", self.device):
            rows = batches(len(self._train.inputs), self._settings.batch, self._seed, number)
            # Threads read while the network learns: what a batch hears does not follow from the one before.
            heard = read_ahead(lambda each: (each, self._heard(each, number)), rows, _BATCHES_AHEAD)
            losses = [self._update(each, chosen, number) for each, chosen in heard]
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise DivergedError(
                f"the loss is {mean} in epoch {number}: lower fit.learning_rate={self._settings.learning_rate} "
                "(or encoder.learning_rate, where the encoder is trained)"
            )
        return len(losses), mean

    def _require_gradients(self, required: bool) -> None:
        """Of what is frozen until it thaws; DDP knows only the parameters that require one when it is made."""
        for parameter in self._frozen:
            parameter.requires_grad_(required)
        self._module = self.ranks.wrap_ddp(self.network)

    def _own(self, rows: np.ndarray) -> list[int]:
        """The places of a batch that are this rank's."""
        return list(range(len(rows)))[self.ranks.rank :: self.ranks.world]

    def _heard(self, rows: np.ndarray, number: int) -> dict[int, np.ndarray]:
        """The window that this epoch hears of each utterance of this rank, by its place in the batch."""
        window_B, augment_B = self._keys("window", rows, number), self._keys("augment", rows, number)
        heard = {}
        # A rank without rows pushes the first one through for nothing, as the others wait for its gradient.
        for place in self._own(rows) or [0]:
            choices = windows(self._train.inputs[rows[place]])
            window = choices[int(bounded(window_B[place], torch.tensor(len(choices))))]
            heard[place] = self._augmented(window, augment_B[place]) if self._settings.augment.enabled else window
        return heard

    def _augmented(self, wave_S: np.ndarray, drawn_by: Tensor) -> np.ndarray:
        """int16 [S]. Raises ValueError for features, which have no waveform to change."""
        if wave_S.ndim != 1:
            raise ValueError("augmentation takes waveforms [S], and these are features [T, C]")
        wave_BS = torch.from_numpy(wave_S.astype(np.float32) / 32768)[None]
        changed_BS = add_effects(wave_BS, drawn_by[None], torch.tensor([len(wave_S)]), self._settings.augment)
        return audio.to_int16(changed_BS[0].numpy())

    def _keys(self, what: str, rows: np.ndarray, number: int) -> Tensor:
        """What an epoch draws of these rows by, whatever rank or batch they are in."""
        return hashed(torch.tensor(key(self._seed, f"{what}/{number}")), self._id_U[torch.from_numpy(rows)])

    def _update(self, rows: np.ndarray, heard: dict[int, np.ndarray], number: int) -> Tensor:
        """One step of the optimiser on these rows, the batch of all ranks; the batch's loss."""
        world, micro_batch = self.ranks.world, self._settings.micro_batch
        own = self._own(rows)
        # The largest share decides for all ranks, whose collectives must meet.
        once = not 0 < micro_batch < -(-len(rows) // world)
        pieces = self._pieces(rows, heard, number)
        made = [self._guess(piece, graph=once) for piece in pieces]
        truth_BP = torch.from_numpy(self._train.truth_UP[rows]).to(self.device)
        guess_BP = torch.zeros_like(truth_BP, dtype=torch.float64)
        for piece, guess in zip(pieces, made, strict=True):
            guess_BP[piece.places] = guess.detach().double() * bool(own)
        guess_BP = self.ranks.sum(guess_BP)
        # DDP divides the sum over ranks by their number.
        gradient_BP = ccc_loss_gradient(guess_BP, truth_BP, self._settings.weights) * (world if own else 0)
        self._optimizer.zero_grad(set_to_none=True)
        for place, (piece, guess) in enumerate(zip(pieces, made, strict=True)):
            with self._gradients_stay(last=place == len(pieces) - 1):
                again = guess if once else self._guess(piece, graph=True)
                again.backward(gradient_BP[piece.places].to(again.dtype))
        if self._settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._settings.clip_norm)
        self._optimizer.step()
        return ccc_loss(guess_BP, truth_BP, self._settings.weights)

    def _pieces(self, rows: np.ndarray, heard: dict[int, np.ndarray], number: int) -> list[_Piece]:
        """The windows of a batch in micro-batches of like length."""
        dropout_B = self._keys("dropout", rows, number)
        order = sorted(heard, key=lambda place: len(heard[place]))
        size = self._settings.micro_batch or len(order)
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        return [_Piece(part, [heard[place] for place in part], dropout_B[part]) for part in parts]

    def _guess(self, piece: _Piece, *, graph: bool) -> Tensor:
        with torch.set_grad_enabled(graph):
            return by_length(self._module if graph else self.network, piece.inputs, self.device, piece.key_B)

    def _gradients_stay(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Ranks exchange gradients once a batch, with the last piece."""
        if last or self.ranks.world == 1:
            return contextlib.nullcontext()
        return self._module.no_sync()  # type: ignore[operator]

    def _keep(self, number: int, updates: int, train_loss: float, dev_ccc: float) -> None:
        done = self.curve[-1].updates if self.curve else 0
        better = self.best is None or dev_ccc > self.best.dev_ccc
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
        # What is still frozen has not had its turn.
        since = max(self.best.epoch, self._settings.thaw_epoch - 1) if self._frozen else self.best.epoch
        return number - since > patience


def device(settings: FitConfig) -> torch.device:
    """Where the fit runs. Raises UserError for fit.device=cuda in a process without a GPU."""
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
