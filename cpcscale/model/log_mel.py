"""Log energies of mel bands, causal and in torch: what the encoder of `model.encoder.kind=logmel` convolves.

B rows, S samples, T frames, W samples of a frame, P points of a spectrum, M bands.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpcscale import audio

# 10 ms, and the 25 ms that a frame is of.
HOP, WINDOW = audio.RATE_HZ // 100, audio.RATE_HZ // 40
# The points of a spectrum are 40 Hz apart: from 76 bands on, two of them would have the same.
MOST_BANDS = 75
_LOWEST_HZ = 20.0
# Added to the energy of a band, which is 1 for white noise of the corpus's power. 60 dB below that, all is silence: at
# the level of speech, the noise of 16-bit samples lies below it, so digital silence looks like a quiet room.
_FLOOR = 1e-6


class LogMel(nn.Module):
    """wave_BS -> x_BTM with T = S // HOP, for waveforms that are scaled to the unit variance of their corpus.

    Frame t is the log energy of M mel bands in the 25 ms that end with sample HOP (t + 1), with zeros before the first
    sample, so nothing after that sample and no padding behind the row changes it. (Kaldi's frames, those of
    handmade/mfcc.py, are centred, and mirrored at the ends of a row.) Each band is standardised by its `mean`
    and `deviation` over the corpus, never over a row, so loudness is kept. These are buffers, so checkpoints hold them.

    40 bands, as in MelHuBERT (Lin et al. 2022, arXiv 2211.09944), keep what the window resolves: harmonics that are
    160 Hz apart. Computed in fp32 in every precision of training.
    """

    mean: Tensor
    deviation: Tensor
    _window: Tensor
    _filters: Tensor

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(bands))
        self.register_buffer("deviation", torch.ones(bands))
        # Hann's, with neither end at 0: scaled so that white noise of unit variance has energy 1 in each point.
        window_W = np.sin(np.pi * (np.arange(WINDOW) + 0.5) / WINDOW) ** 2
        window_W /= np.sqrt(np.square(window_W).sum())
        self.register_buffer("_window", torch.from_numpy(window_W.astype(np.float32)), persistent=False)
        self.register_buffer("_filters", torch.from_numpy(mel_filters(bands).astype(np.float32)), persistent=False)

    def forward(self, wave_BS: Tensor) -> Tensor:
        return (self.log_energy(wave_BS) - self.mean) / self.deviation

    def log_energy(self, wave_BS: Tensor) -> Tensor:
        """x_BTM before it is standardised."""
        with torch.autocast(wave_BS.device.type, enabled=False):
            frames = wave_BS.shape[1] // HOP
            if not frames:
                return wave_BS.new_zeros(len(wave_BS), 0, len(self.mean))
            padded_BS = F.pad(wave_BS[:, : frames * HOP], (WINDOW - HOP, 0))
            # Not padded to a power of 2: on a CPU that takes twice as long, and a matrix product four times.
            spectrum_BTP = torch.fft.rfft(padded_BS.unfold(1, WINDOW, HOP) * self._window)
            energy_BTP = spectrum_BTP.real.square() + spectrum_BTP.imag.square()
            return torch.log(energy_BTP @ self._filters + _FLOOR)

    @torch.no_grad()
    def measure(self, waves: Iterable[Tensor]) -> None:
        """Sets `mean` and `deviation` to those of all frames of these waveforms [S], one of which is in memory at a
        time. A band that does not change keeps the deviation 1; without a frame, nothing changes."""
        frames = 0
        sums_2M = torch.zeros(2, len(self.mean), dtype=torch.float64)
        for wave_S in waves:
            x_TM = self.log_energy(wave_S.unsqueeze(0))[0].double().cpu()
            frames += len(x_TM)
            sums_2M += torch.stack([x_TM.sum(0), x_TM.square().sum(0)])
        if frames:
            mean_M, square_M = sums_2M / frames
            deviation_M = (square_M - mean_M.square()).clamp(min=0).sqrt()
            self.mean.copy_(mean_M)
            self.deviation.copy_(torch.where(deviation_M > 1e-3, deviation_M, 1.0))


def mel_filters(bands: int) -> np.ndarray:
    """[P, M]: the weights of each point of the spectrum in each band, which sum to 1 over the points.

    Triangles of equal width and distance on O'Shaughnessy's mel scale, from 20 Hz to half the sample rate.
    """
    mel_P1 = _mel(np.fft.rfftfreq(WINDOW, 1 / audio.RATE_HZ))[:, None]
    lowest, highest = _mel(np.array([_LOWEST_HZ, audio.RATE_HZ / 2])).tolist()
    edges = np.linspace(lowest, highest, bands + 2)
    reach = edges[1] - edges[0]
    weight_PM = np.maximum(0.0, 1 - np.abs(mel_P1 - edges[1:-1]) / reach)
    return np.asarray(weight_PM / weight_PM.sum(axis=0))


def frame_operations(bands: int) -> int:
    """Operations of one frame as model/cost.py counts them: those of the filters."""
    return 2 * (WINDOW // 2 + 1) * bands


def _mel(hz: np.ndarray) -> np.ndarray:
    return np.asarray(2595 * np.log10(1 + hz / 700))
