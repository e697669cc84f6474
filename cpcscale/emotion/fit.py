"""Training one recogniser: Adam on the CCC loss of each whole batch, the epoch chosen on development speakers.

The whole of it is a function of its arguments and the seed. Shuffling has a generator of its own and dropout is seeded
for each epoch, so several fits may take turns epoch by epoch, as a sweep has them do, without touching each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale import config
from cpcscale.emotion.recogniser import EndToEnd
from cpcscale.errors import UserError
from cpcscale.objective.ccc import ccc, ccc_loss

# Rows pushed through at once.
_GROUP = 8
# Padded lengths are multiples of these, half a second: torch keeps kernels and buffers for every length it has met, and
# with one of its own for each batch of waveforms that comes to gigabytes.
_WAVE_STEP, _FRAME_STEP = 8000, 50


class DivergedError(UserError):
    """A loss that is not finite."""


@dataclass(kw_only=True)
class FitConfig:
    """How a recogniser is trained. The loss is 1 - a CCC_act - b CCC_val - g CCC_dom with g = 1 - a - b."""

    epochs: int = 50
    batch: int = 32  # utterances; the CCC is that of the whole batch, so it is part of the loss
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    patience: int = 0  # epochs without a better development CCC before it stops; 0: never
    activation_weight: float = 1 / 3  # a
    valence_weight: float = 1 / 3  # b
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU when this process has one

    def __post_init__(self) -> None:
        config.at_least(1, **{"fit.epochs": self.epochs})
        # One utterance has no CCC.
        config.at_least(2, **{"fit.batch": self.batch})
        names = ("learning_rate", "weight_decay", "patience", "activation_weight", "valence_weight")
        config.at_least(0, **{f"fit.{name}": getattr(self, name) for name in names})
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
class Examples:
    """Utterances as a network takes them, and what it should say.

    `inputs` are float32 features [T, C] or int16 waveforms [S], one an utterance; `truth_UP` the labels on [-1, 1].
    """

    inputs: Sequence[np.ndarray]
    truth_UP: np.ndarray


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training part came to; `updates` and `best_dev_ccc` are since the start."""

    epoch: int
    updates: int
    train_loss: float
    dev_ccc: float
    best_dev_ccc: float


class Fit:
    """Iterating trains, one Epoch a pass, until the last or until patience ends; `finish` gives the best epoch's net.

    Raises DivergedError when the loss is not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Examples,
        dev: Examples,
        settings: FitConfig,
        *,
        seed: int,
        encoder_rate: float = 0.0,
    ) -> None:
        """`encoder_rate` is the learning rate of the CPC part of an EndToEnd network."""
        self.device = device(settings)
        self.network = network.to(self.device)
        self.curve: list[Epoch] = []
        self.best: Epoch | None = None
        self._best_weights: dict[str, Tensor] = {}
        self._train, self._dev, self._settings, self._seed = train, dev, settings, seed
        self._optimizer = torch.optim.Adam(
            _groups(network, settings.learning_rate, encoder_rate), weight_decay=settings.weight_decay
        )

    def __iter__(self) -> Iterator[Epoch]:
        for number in range(len(self.curve) + 1, self._settings.epochs + 1):
            if self._patience_is_over(number):
                return
            updates, train_loss = self._pass(number)
            dev_ccc = float(ccc(self._dev.truth_UP, predict(self.network, self._dev.inputs, self.device)).mean())
            self._keep(number, updates, train_loss, dev_ccc)
            yield self.curve[-1]

    def finish(self) -> nn.Module:
        """The network with the weights of the best epoch, in evaluation mode."""
        if self.best is not None:
            self.network.load_state_dict(self._best_weights)
        return self.network.eval()

    def _pass(self, number: int) -> tuple[int, float]:
        """One epoch of updates: (how many, mean loss)."""
        self.network.train()
        losses = []
        with seeded(self._seed, f"dropout/{number}", self.device):
            for rows in batches(len(self._train.inputs), self._settings.batch, self._seed, number):
                guess_BP = by_length(self.network, [self._train.inputs[row] for row in rows], self.device)
                truth_BP = torch.from_numpy(self._train.truth_UP[rows]).to(self.device)
                loss = ccc_loss(guess_BP, truth_BP, self._settings.weights)
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self._optimizer.step()
                losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise DivergedError(
                f"the loss is {mean} in epoch {number}: lower fit.learning_rate={self._settings.learning_rate} "
                "(or encoder.learning_rate, where the encoder is trained)"
            )
        return len(losses), mean

    def _keep(self, number: int, updates: int, train_loss: float, dev_ccc: float) -> None:
        done = self.curve[-1].updates if self.curve else 0
        better = self.best is None or dev_ccc > self.best.dev_ccc
        best_dev_ccc = dev_ccc if better or self.best is None else self.best.dev_ccc
        self.curve.append(Epoch(number, done + updates, train_loss, dev_ccc, best_dev_ccc))
        if better:
            self.best = self.curve[-1]
            # Copies: the state dict itself refers to the weights that the next epoch changes.
            self._best_weights = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def _patience_is_over(self, number: int) -> bool:
        patience = self._settings.patience
        return bool(patience and self.best and number - self.best.epoch > patience)


def predict(network: nn.Module, inputs: Sequence[np.ndarray], where: torch.device) -> np.ndarray:
    """float64 [U, P] in the order of `inputs`."""
    network.eval()
    with torch.inference_mode():
        return by_length(network, inputs, where).double().cpu().numpy()


def by_length(network: nn.Module, inputs: Sequence[np.ndarray], where: torch.device) -> Tensor:
    """guess_BP in the order of `inputs`, computed in groups of like length.

    The same as in one padded batch, for less: attention costs the square of the longest row.
    """
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]))
    groups = [order[start : start + _GROUP] for start in range(0, len(order), _GROUP)]
    guesses = [network(*collate([inputs[row] for row in group], where)) for group in groups]
    return torch.cat(guesses)[torch.tensor(order, device=where).argsort()]


def batches(count: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each batch of an epoch: every row once, in a keyed order, sizes at most `size` and as even as can be.

    Even sizes, because the CCC of a short rest would be noise with the weight of a whole batch.
    """
    generator = torch.Generator().manual_seed(key(seed, f"order/{epoch}"))
    return np.array_split(torch.randperm(count, generator=generator).numpy(), -(-count // size))


def collate(rows: Sequence[np.ndarray], where: torch.device) -> tuple[Tensor, Tensor]:
    """(x, lengths_B), padded with zeros: features as x_BTC and frames, int16 waveforms as floats x_BS and samples."""
    lengths_B = torch.tensor([len(row) for row in rows])
    step = _WAVE_STEP if rows[0].ndim == 1 else _FRAME_STEP
    x = np.zeros((len(rows), -(-int(lengths_B.max()) // step) * step, *rows[0].shape[1:]), np.float32)
    for number, row in enumerate(rows):
        x[number, : len(row)] = row
    if rows[0].dtype == np.int16:
        x /= 32768
    return torch.from_numpy(x).to(where), lengths_B.to(where)


@contextlib.contextmanager
def seeded(seed: int, what: str, where: torch.device | None = None) -> Iterator[None]:
    """Inside, torch's global generators are keyed by (seed, what); afterwards they are as they were."""
    devices = [where] if where is not None and where.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key(seed, what))
        yield


def device(settings: FitConfig) -> torch.device:
    """Where the fit runs. Raises UserError for fit.device=cuda in a process without a GPU."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("fit.device=cuda, but this process sees no GPU: use fit.device=auto or cpu")
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _groups(network: nn.Module, rate: float, encoder_rate: float) -> list[dict[str, object]]:
    if not isinstance(network, EndToEnd):
        return [{"params": list(network.parameters()), "lr": rate}]
    return [
        {"params": list(network.recogniser.parameters()), "lr": rate},
        {"params": list(network.encoder.parameters()), "lr": encoder_rate},
    ]


def key(seed: int, what: str) -> int:
    """A seed of its own for `what`, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}".encode()).digest()[:8], "big") >> 1
