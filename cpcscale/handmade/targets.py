"""What the acoustic objective of pretraining predicts: measures of the clean samples of a window. Pure.

A window of 10 s takes 84 ms of one core, half of it the pitch tracker. Threads of the feed measure it beside decoding;
Kaldi's code leaves Python's lock free meanwhile.
"""

from __future__ import annotations

import numpy as np

from cpcscale import audio
from cpcscale.handmade import functionals, mfcc, prosody

HOP_SAMPLES = audio.RATE_HZ // 100
# Energy in dB, log2 of F0 in Hz, whether the frame is voiced (0 or 1), and the cepstra without c0, which is energy too.
FRAME_NAMES = ("energy", "f0", "voicing", *(f"c{number}" for number in range(1, functionals.COEFFICIENTS)))
# Without the duration, which is the same for all windows of a long recording.
WINDOW_NAMES = (*functionals.NAMES[:-1], *prosody.NAMES[:-1])
# Fewer voiced frames give no statistics of voice; less audio than a second gives none of a window.
LEAST_VOICED = 10
LEAST_SAMPLES = audio.RATE_HZ

_OF_VOICE = np.array([name.startswith(("f0_", "energy_voiced", "correlation_voiced")) for name in WINDOW_NAMES])


def measure(wave_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(measures of frames float32 [S // HOP_SAMPLES, FRAME_NAMES], of the window float32 [WINDOW_NAMES]); NaN: none.

    `wave_S` are int16 samples at 16 kHz. Frames are those of mfcc.py, centred on their 10 ms. F0 has a value where the
    frame is voiced.
    """
    frame_TF = np.full((len(wave_S) // HOP_SAMPLES, len(FRAME_NAMES)), np.nan, np.float32)
    window_F = np.full(len(WINDOW_NAMES), np.nan, np.float32)
    if len(wave_S) < mfcc.LEAST_S * audio.RATE_HZ:
        return frame_TF, window_F
    float_S = wave_S.astype(np.float32) / 32768
    c_TC = mfcc.mfcc(float_S, functionals.COEFFICIENTS)
    f0_T, correlation_T, voiced_T = prosody.track_pitch(float_S)
    energy_T = prosody.frame_energy(float_S, len(f0_T))
    # The tracker may have a frame less.
    tracked = len(f0_T)
    frame_TF[:tracked, 0], frame_TF[:tracked, 2] = energy_T, voiced_T
    frame_TF[:tracked, 1] = np.where(voiced_T, np.log2(f0_T), np.nan)
    frame_TF[: len(c_TC), 3:] = c_TC[:, 1:]
    if len(wave_S) >= LEAST_SAMPLES:
        prosodic = prosody.describe_tracks(f0_T, correlation_T, voiced_T, energy_T, len(wave_S) / audio.RATE_HZ)
        window_F[:] = np.concatenate([functionals.describe_cepstra(c_TC), prosodic[:-1]])
        if voiced_T.sum() < LEAST_VOICED:
            window_F[_OF_VOICE] = np.nan
    return frame_TF, window_F
