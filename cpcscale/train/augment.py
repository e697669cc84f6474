"""Adds effects to waveforms: noise, reverberation, dropped frequency bands and dropped time spans.

Past-only augmentation (Kharitonov et al. 2020, arXiv 2007.00991): the context c is computed from the augmented
waveform, the latents z that it predicts from the clean one. Two rules make that safe here:

- Keyed: the effects of a row depend only on its key, never on a random generator, other rows or their order.
- Causal: sample s of the result depends only on samples 0..s of the row, so c_t learns nothing about the frames that it
  predicts. Filters therefore have minimum phase or start with the direct path, and the noise level follows the mean
  power so far. Convolutions use FFTs in fp64. Their rounding leaks later samples at 1e-15 of the largest one, which
  fp32 cannot hold except for a last bit here and there.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from cpcscale import audio
from cpcscale.errors import UserError
from cpcscale.objective.hash_random import bounded, hashed, uniform

# Each effect's number in the hash, apart from those of the objective, which are small and positive.
_REVERB, _NOISE, _BAND, _TIME = range(-104, -100)
# Noise starts here: otherwise most octaves of pink noise would be inaudible.
_NOISE_FROM_HZ = 20.0
# Dropped bands lie in this range: lower edges ring longer, and higher ones pass the Nyquist frequency.
_BAND_HZ = (100.0, 7_900.0)
_BAND_ORDER = 4


@dataclass(kw_only=True)
class EffectsConfig:
    """Each effect's probability for a row, and the range that its strength is drawn from evenly."""

    # The prefix of these keys in a config, for error messages.
    PLACE: ClassVar[str] = "augment"
    # A pitch shifter, removed after 0.1.
    REMOVED: ClassVar[dict[str, Any]] = {"pitch_p": 0.0, "pitch_cents": [-300.0, 300.0]}

    # Probability of added noise, whose colour is drawn between white and pink.
    noise_p: float = 0.5
    # Signal-to-noise ratio in dB: mean power of the row up to each sample over that of the noise.
    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 20.0])
    # Probability of reverberation.
    reverb_p: float = 0.5
    # Seconds in which the reverberation falls by 60 dB.
    reverb_rt60_s: list[float] = field(default_factory=lambda: [0.1, 0.6])
    # Energy of the direct path over that of the reverberation, in dB.
    reverb_direct_db: list[float] = field(default_factory=lambda: [0.0, 12.0])
    # Probability that one band of frequencies is dropped.
    band_drop_p: float = 0.25
    # Width of the dropped band in Hz; its lower edge is drawn evenly on the mel scale.
    band_drop_hz: list[float] = field(default_factory=lambda: [100.0, 1000.0])
    # Probability that one span of time is set to zero.
    time_drop_p: float = 0.25
    # Length of that span in seconds.
    time_drop_s: list[float] = field(default_factory=lambda: [0.01, 0.05])

    def __post_init__(self) -> None:
        for name in ("noise_p", "reverb_p", "band_drop_p", "time_drop_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{self.PLACE}.{name}={getattr(self, name)} is not a probability: give 0 to 1")
        for name, least, most in (
            ("noise_snr_db", -60.0, 120.0),
            ("reverb_rt60_s", 0.01, 5.0),
            ("reverb_direct_db", -60.0, 120.0),
            ("band_drop_hz", 20.0, _BAND_HZ[1] - _BAND_HZ[0]),
            ("time_drop_s", 0.0, 60.0),
        ):
            ends = getattr(self, name)
            if len(ends) != 2 or not least <= ends[0] <= ends[1] <= most:
                raise UserError(
                    f"{self.PLACE}.{name}={ends} is not a valid range: give [low, high] within {least:g} to {most:g}"
                )


@dataclass(kw_only=True)
class AugmentConfig(EffectsConfig):
    """The effects on the audio from which a pretraining computes its contexts."""

    # Whether contexts come from augmented audio; if so, the encoder runs twice. The paper's recipe has none.
    past: bool = False


def add_effects(wave_BS: Tensor, key_B: Tensor, samples_B: Tensor, config: EffectsConfig) -> Tensor:
    """float32 [B, S]: each row with the effects that its key draws, in the order of reverberation, noise, band, time.

    The first samples_B[b] samples of row b are real; the rest is 0 in the result. `key_B` and `samples_B` are on the
    CPU: rows are chosen there, so that the host need not wait for a GPU. A row gets the same effects alone, in any
    batch and on any device: the same draws and dropped spans, samples equal up to fp32 rounding. Rows that draw no
    effect are returned bit for bit. The level is not rescaled: noise and reverberation add to it.
    """
    effects = (
        (_REVERB, config.reverb_p, _reverb),
        (_NOISE, config.noise_p, _noise),
        (_BAND, config.band_drop_p, _band_drop),
        (_TIME, config.time_drop_p, _time_drop),
    )
    result_BS, device = wave_BS, wave_BS.device
    for name, probability, effect in effects:
        draws = _Draws(hashed(key_B, torch.tensor(name)), samples_B)
        rows = (draws.share(0) < probability).nonzero().flatten()
        if len(rows):
            there, chosen = rows.to(device, non_blocking=True), draws.of(rows, device)
            result_BS = result_BS.index_copy(0, there, effect(result_BS[there], chosen, config).to(wave_BS.dtype))
    real_B1 = samples_B.to(device, non_blocking=True).unsqueeze(1)
    return result_BS.where(torch.arange(wave_BS.shape[1], device=device) < real_B1, 0)


@dataclass(frozen=True)
class _Draws:
    """The random numbers of one effect for B rows, by number from 0, and the rows' lengths."""

    key_B: Tensor
    samples_B: Tensor

    def of(self, rows: Tensor, device: torch.device) -> _Draws:
        """The draws of these rows alone, on the device."""
        key_B, samples_B = (each[rows].to(device, non_blocking=True) for each in (self.key_B, self.samples_B))
        return _Draws(key_B, samples_B)

    def bits(self, number: int) -> Tensor:
        return hashed(self.key_B, torch.tensor(number))

    def share(self, number: int) -> Tensor:
        """float64 [B] in [0, 1)."""
        return uniform(self.bits(number)).double()

    def between(self, number: int, ends: list[float]) -> Tensor:
        """float64 [B] in [low, high)."""
        return ends[0] + (ends[1] - ends[0]) * self.share(number)

    def white(self, number: int, samples: int) -> Tensor:
        """float64 [B, samples]: white noise of unit power."""
        return white_noise(self.bits(number), samples)


def white_noise(key_B: Tensor, samples: int) -> Tensor:
    """float64 [B, samples]: white noise of unit power, uniformly distributed, a function of each row's key."""
    place_S = torch.arange(samples, device=key_B.device)
    return (uniform(hashed(key_B.unsqueeze(1), place_S)).double() - 0.5) * math.sqrt(12)


def coloured_noise(white_BS: Tensor, tilt_B: Tensor) -> Tensor:
    """float64 [B, S]: noise whose power falls as f^-tilt above 20 Hz, with none below: 0 is white, 1 pink."""
    samples = white_BS.shape[1]
    hz_F = torch.fft.rfftfreq(samples, 1 / audio.RATE_HZ, dtype=torch.float64, device=white_BS.device)
    shape_BF = hz_F.clamp(min=_NOISE_FROM_HZ) ** (-tilt_B.unsqueeze(1) / 2) * (hz_F >= _NOISE_FROM_HZ)
    shape_BF = shape_BF / shape_BF.square().mean(1, keepdim=True).sqrt()
    return torch.fft.irfft(torch.fft.rfft(white_BS) * shape_BF, samples)


def _noise(wave_BS: Tensor, draws: _Draws, config: EffectsConfig) -> Tensor:
    samples = wave_BS.shape[1]
    snr_B, tilt_B = draws.between(1, config.noise_snr_db), draws.share(2)
    # The noise itself is independent of the row's samples: it stays causal.
    noise_BS = coloured_noise(draws.white(3, samples), tilt_B)
    counts_S = torch.arange(1, samples + 1, device=wave_BS.device)
    power_BS = wave_BS.double().square().cumsum(1) / counts_S
    return wave_BS + noise_BS * (power_BS * 10 ** (-snr_B.unsqueeze(1) / 10)).sqrt()


def _reverb(wave_BS: Tensor, draws: _Draws, config: EffectsConfig) -> Tensor:
    """Convolves with the direct path at 1, then exponentially decaying noise from the next sample on (Polack 1988)."""
    rt60_B, direct_B = draws.between(1, config.reverb_rt60_s), draws.between(2, config.reverb_direct_db)
    taps = round(config.reverb_rt60_s[1] * audio.RATE_HZ)
    place_L = torch.arange(taps, device=wave_BS.device)
    fall_BL = 10 ** (-3 * place_L / (rt60_B.unsqueeze(1) * audio.RATE_HZ)) * (place_L > 0)
    level_B1 = 10 ** (-direct_B.unsqueeze(1) / 20) / fall_BL.square().sum(1, keepdim=True).sqrt()
    return _convolved(wave_BS, draws.white(3, taps) * fall_BL * level_B1 + (place_L == 0))


def _band_drop(wave_BS: Tensor, draws: _Draws, config: EffectsConfig) -> Tensor:
    width_B = draws.between(1, config.band_drop_hz)
    lowest, highest_B = _mel(torch.tensor(_BAND_HZ[0])), _mel(_BAND_HZ[1] - width_B)
    low_B = _hz(lowest + (highest_B - lowest) * draws.share(2))
    # The slowest pole falls by e^-20 over the response.
    decay = math.pi * math.sin(math.pi / (2 * _BAND_ORDER)) * min(_BAND_HZ[0], config.band_drop_hz[0])
    return _convolved(wave_BS, band_stop(low_B, low_B + width_B, 2 * math.ceil(10 * audio.RATE_HZ / decay)))


def _time_drop(wave_BS: Tensor, draws: _Draws, config: EffectsConfig) -> Tensor:
    length_B1 = (draws.between(1, config.time_drop_s) * audio.RATE_HZ).long().unsqueeze(1)
    start_B1 = bounded(draws.bits(2), draws.samples_B).unsqueeze(1)
    place_S = torch.arange(wave_BS.shape[1], device=wave_BS.device)
    return wave_BS.where((place_S < start_B1) | (place_S >= start_B1 + length_B1), 0)


def band_stop(low_B: Tensor, high_B: Tensor, taps: int) -> Tensor:
    """float64 [B, taps]: the impulse responses of 8-pole Butterworth band-stops with these edges in Hz, `taps` even.

    Designed as by scipy.signal.butter (bilinear transform, warped edges), but from the closed form of the frequency
    response, so that rows with different edges are made at once. Minimum phase; ringing beyond `taps` wraps around.
    """
    low_B1, high_B1 = (torch.tan(math.pi * edge_B.unsqueeze(1) / audio.RATE_HZ) for edge_B in (low_B, high_B))
    warped_F = torch.tan(math.pi * torch.arange(taps // 2 + 1, dtype=torch.float64, device=low_B.device) / taps)
    beyond_BF = low_B1 * high_B1 - warped_F.square()
    within_BF = (high_B1 - low_B1) * warped_F
    response_BF = torch.ones_like(beyond_BF, dtype=torch.complex128)
    for number in range(_BAND_ORDER):
        pole = cmath.exp(1j * math.pi * (0.5 + (2 * number + 1) / (2 * _BAND_ORDER)))
        response_BF = response_BF * beyond_BF / (1j * within_BF - pole * beyond_BF)
    return torch.fft.irfft(response_BF, taps)


def _convolved(wave_BS: Tensor, response_BL: Tensor) -> Tensor:
    """float64 [B, S]: the first S samples of each row convolved with its own causal response."""
    # Takes a fifth of a second, which what does not augment need not wait for.
    from scipy.fft import next_fast_len

    size = next_fast_len(wave_BS.shape[1] + response_BL.shape[1] - 1, real=True)
    product = torch.fft.rfft(wave_BS.double(), size) * torch.fft.rfft(response_BL, size)
    return torch.fft.irfft(product, size)[:, : wave_BS.shape[1]]


def _mel(hz: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + hz / 700)


def _hz(mel: Tensor) -> Tensor:
    return 700 * (10 ** (mel / 2595) - 1)
