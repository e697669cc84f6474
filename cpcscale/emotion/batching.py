"""Batches of utterances for a network: their order, padding, groups of like length, and predictions.

U utterances, W windows, B rows of a batch, T frames, C features, S samples, P primitives.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from cpcscale.emotion.audio.prefetch import read_ahead
from cpcscale.emotion.scores.ccc import PRIMITIVES
from cpcscale.train.ranks import Ranks

# The most padded audio in one forward pass, 20 s; on a CPU, larger passes are slower per second of audio.
_WAVE_GROUP, _FRAME_GROUP = 320_000, 2000
# Utterances predicted together, grouped by length; fewer if they have many bytes.
_CHUNK, _CHUNK_BYTES = 1024, 256 * 2**20
_READ_AHEAD = 64
# Padded lengths are multiples of these, half a second: torch keeps kernels and buffers for each length it has seen,
# which would take gigabytes if every batch of waveforms had another length.
_WAVE_STEP, _FRAME_STEP = 8000, 50

# A feature matrix [T, C] or an int16 waveform [S], or a tuple of them: the windows of a longer utterance.
Utterance: TypeAlias = "np.ndarray | tuple[np.ndarray, ...]"


def windows_of(utterance: Utterance) -> tuple[np.ndarray, ...]:
    """The windows of an utterance as a tuple. Raises ValueError if there is none."""
    parts = (utterance,) if isinstance(utterance, np.ndarray) else tuple(utterance)
    if not parts:
        raise ValueError("an utterance has no window: give each at least one")
    return parts


def predict(
    network: nn.Module,
    inputs: Sequence[Utterance],
    where: torch.device,
    ranks: Ranks | None = None,
    shares: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Predictions float64 [U, P] in the order of `inputs`: for each utterance the weighted mean over its windows.

    `shares` are the weights of each utterance's windows, [W] with sum 1; by default their lengths. All `ranks` call
    this and divide the utterances among them; the result is the same on each, bit for bit.
    """
    network.eval()
    ranks = ranks or Ranks(0, 1, 1, where)
    own = range(len(inputs))[ranks.rank :: ranks.world]
    guess_UP = torch.zeros(len(inputs), len(PRIMITIVES), dtype=torch.float64)
    with torch.inference_mode():
        for rows, parts in _chunks(inputs, own):
            guess_WP = forward_by_length(network, [window for part in parts for window in part], where).double().cpu()
            each = [_shares_by_length(part) for part in parts] if shares is None else [shares[row] for row in rows]
            row_W = [row for row, part in zip(rows, parts, strict=True) for _ in part]
            share_W1 = torch.from_numpy(np.concatenate(each))[:, None]
            guess_UP.index_add_(0, torch.tensor(row_W), guess_WP * share_W1)
    return ranks.sum(guess_UP).numpy()


def _chunks(
    inputs: Sequence[Utterance], rows: Sequence[int]
) -> Iterator[tuple[list[int], list[tuple[np.ndarray, ...]]]]:
    """(rows, windows of each) of consecutive utterances: as many as are predicted together, to bound memory."""
    parts, size = list[tuple[np.ndarray, ...]](), 0
    done = 0
    for part in read_ahead(lambda row: windows_of(inputs[row]), rows, _READ_AHEAD):
        parts.append(part)
        size += sum(window.nbytes for window in part)
        if len(parts) == _CHUNK or size >= _CHUNK_BYTES:
            yield list(rows[done : done + len(parts)]), parts
            done, parts, size = done + len(parts), [], 0
    if parts:
        yield list(rows[done:]), parts


def forward_by_length(
    network: nn.Module, inputs: Sequence[np.ndarray], where: torch.device, key_B: Tensor | None = None
) -> Tensor:
    """The network's output [B, P] in the order of `inputs`, computed in groups of like length.

    The result is that of one padded batch, but cheaper: attention costs the square of the longest row. `key_B`, on the
    CPU, keys each row's dropout.
    """
    groups = group_by_length(inputs)
    guesses = []
    for group in groups:
        x, lengths_B = collate([inputs[row] for row in group], where)
        if key_B is None:
            guesses.append(network(x, lengths_B))
            continue
        # An encoder may draw from torch's generator: a second pass of this group draws the same.
        torch.manual_seed(int(key_B[group[0]]))
        guesses.append(network(x, lengths_B, key_B[group].to(where)))
    order = torch.tensor([row for group in groups for row in group], device=where)
    return torch.cat(guesses)[order.argsort()]


def epoch_batches(count: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The row numbers of each batch of an epoch: every row once, in an order keyed by (seed, epoch).

    Batches are at most `size` and as even as possible: the CCC of a short last batch would be noise with full weight.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, f"order/{epoch}"))
    return np.array_split(torch.randperm(count, generator=generator).numpy(), -(-count // size))


def collate(rows: Sequence[np.ndarray], where: torch.device) -> tuple[Tensor, Tensor]:
    """(x, lengths_B), padded with zeros: features as x_BTC, or int16 waveforms as floats x_BS in [-1, 1)."""
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
    """A block in which torch's global generators are seeded by (seed, what); afterwards they are as they were."""
    devices = [where] if where is not None and where.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, what))
        yield


def derive_seed(seed: int, what: str) -> int:
    """A seed of 63 bits for the purpose `what`, derived from `seed` by sha256."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}".encode()).digest()[:8], "big") >> 1


def _shares_by_length(parts: Sequence[np.ndarray]) -> np.ndarray:
    lengths_W = np.array([len(part) for part in parts], np.float64)
    return lengths_W / lengths_W.sum()


def group_by_length(inputs: Sequence[np.ndarray]) -> list[list[int]]:
    """Row numbers from the shortest to the longest, in groups of at most 20 s of padded audio (or one row)."""
    most = _WAVE_GROUP if inputs[0].ndim == 1 else _FRAME_GROUP
    groups: list[list[int]] = []
    for row in sorted(range(len(inputs)), key=lambda row: len(inputs[row])):
        if groups and len(inputs[row]) * (len(groups[-1]) + 1) <= most:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
