"""Audio with effects added: noise, reverberation, dropped frequency bands and dropped time spans.

Past-only augmentation (Kharitonov et al. 2020, arXiv 2007.00991): the context c comes from the augmented waveform, the
latents z that it is compared with from the clean one. Two laws make that safe here:

- Keyed: what happens to a row follows from its key alone, never from a generator, the other rows or their order.
- Causal: sample s of the result is a function of samples 0..s of the row, so c_t learns nothing of the frames that it
  predicts. Filters therefore have minimum phase or a direct path first, and the level of the noise goes by the power so
  far. Convolutions are by FFT in fp64, whose rounding lets later samples through at 1e-15 of the largest one: too
  little for fp32 to hold, but for a last bit here and there.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from cpcscale import audio
from cpcscale.errors import UserError
from cpcscale.objective.hash_random import bounded, hashed, uniform

# Each effect's name in the hash, away from the objective's, which are small and positive.
_REVERB, _NOISE, _BAND, _TIME = range(-104, -100)
# Noise lies above this, as most octaves of pink noise would else be below hearing.
_NOISE_FROM_HZ = 20.0
# Dropped bands lie between these; a lower edge rings longer, an upper one has no place below the Nyquist frequency.
_BAND_HZ = (100.0, 7_900.0)
_BAND_ORDER = 4


@dataclass(kw_only=True)
class EffectsConfig:
    """Each effect's probability for a row, and the range that its strength is drawn from evenly."""

    # Where the effects stand in a config, as errors name them.
    PLACE: ClassVar[str] = "augment"
    # A pitch shifter, removed after 0.1.
    REMOVED: ClassVar[dict[str, Any]] = {"pitch_p": 0.0, "pitch_cents": [-300.0, 300.0]}

    # Noise beside the speech.
    noise_p: float = 0.5
    # Power of the row so far over that of the noise; its colour lies anywhere between white and pink.
    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 20.0])
    # A room around it.
    reverb_p: float = 0.5
    # Seconds in which the reverberation falls by 60 dB.
    reverb_rt60_s: list[float] = field(default_factory=lambda: [0.1, 0.6])
    # Energy of the direct path over that of the reverberation.
    reverb_direct_db: list[float] = field(default_factory=lambda: [0.0, 12.0])
    # A band of frequencies is missing.
    band_drop_p: float = 0.25
    # Width of the band that is dropped; where it begins is drawn evenly on the mel scale.
    band_drop_hz: list[float] = field(default_factory=lambda: [100.0, 1000.0])
    # A span of time is missing.
    time_drop_p: float = 0.25
    # Length of the span that is set to zero.
    time_drop_s: list[float] = field(default_factory=lambda: [0.01, 0.05])

    def __post_init__(self) -> None:
        for name in ("noise_p", "reverb_p", "band_drop_p", "time_drop_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{self.PLACE}.{name}={getattr(self, name)} is no probability: give 0 to 1")
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
                    f"{self.PLACE}.{name}={ends} is no range: give [low, high] within {least:g} to {most:g}"
                )


@dataclass(kw_only=True)
class AugmentConfig(EffectsConfig):
    """What the contexts of a pretraining hear."""

    # Whether contexts come from augmented audio at all; the encoder then runs twice. The paper's recipe has none.
    past: bool = False


def add_effects(wave_BS: Tensor, key_B: Tensor, samples_B: Tensor, config: EffectsConfig) -> Tensor:
    """float32 [B, S]: each row with the effects its key draws, in the order of sound: voice, room, microphone, channel.

    `key_B` and `samples_B` are on the CPU, where it is drawn which rows are changed: a GPU need not say how many. Of
    row b the first samples_B[b] samples are real; the rest is 0 in the result. A row is the same alone and in any
    batch, on any device, bit for bit in what is drawn and where time is dropped, else to the rounding of fp32. Rows
    that draw no effect come back bit for bit. Not scaled: noise and reverberation add to the level.
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
    """The random numbers of one effect for B rows, numbered from 0, and the rows' lengths."""

    key_B: Tensor
    samples_B: Tensor

    def of(self, rows: Tensor, device: torch.device) -> _Draws:
        """Those of these rows, on the device."""
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
    """float64 [B, samples]: white noise of unit power, even over its range, that follows from each row's key."""
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
    # It knows nothing of the row.
    noise_BS = coloured_noise(draws.white(3, samples), tilt_B)
    counts_S = torch.arange(1, samples + 1, device=wave_BS.device)
    power_BS = wave_BS.double().square().cumsum(1) / counts_S
    return wave_BS + noise_BS * (power_BS * 10 ** (-snr_B.unsqueeze(1) / 10)).sqrt()


def _reverb(wave_BS: Tensor, draws: _Draws, config: EffectsConfig) -> Tensor:
    """The direct path at 1, then exponentially decaying noise from the next sample on (Polack 1988)."""
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

    As scipy.signal.butter designs them (bilinear transform, edges warped), from their frequency response in closed
    form, so that rows of any edges are made at once. Minimum phase; what rings on after `taps` wraps round.
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
    """float64 [B, S]: the first S samples of the rows convolved each with its own causal response."""
    size = next_fast_len(wave_BS.shape[1] + response_BL.shape[1] - 1, real=True)
    product = torch.fft.rfft(wave_BS.double(), size) * torch.fft.rfft(response_BL, size)
    return torch.fft.irfft(product, size)[:, : wave_BS.shape[1]]


def _mel(hz: Tensor) -> Tensor:
    return 2595 * torch.log10(1 + hz / 700)


def _hz(mel: Tensor) -> Tensor:
    return 700 * (10 ** (mel / 2595) - 1)
