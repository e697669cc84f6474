"""The classic spectral features of an utterance: statistics of its MFCCs over time (Schuller et al., Interspeech 2009).

Pure. They cover the level of a recording (c0) and its variation, the long-term spectrum and how fast it changes, and
the duration, but not pitch, which prosody.py covers.
"""

from __future__ import annotations

import kaldi_native_fbank as knf
import numpy as np

from cpcscale import audio
from cpcscale.handmade import mfcc
from cpcscale.handmade.mfcc import refuse_short

# Raise it when `functionals` gives other values.
VERSION = 1
COEFFICIENTS = 20
PERCENTILES = (5, 25, 50, 75, 95)
NAMES = (
    *(f"c{number}_mean" for number in range(COEFFICIENTS)),
    *(f"c{number}_deviation" for number in range(COEFFICIENTS)),
    *(f"c{number}_delta_deviation" for number in range(COEFFICIENTS)),
    *(f"c0_percentile_{percent}" for percent in PERCENTILES),
    "duration_s",
)


def functionals(wave_S: audio.Sliced) -> np.ndarray:
    """The features named by NAMES, float32 [66], of a float waveform in [-1, 1) at 16 kHz.

    The deltas are Kaldi's: the slope of a line through five frames. Raises UserError for less than 0.1 s.
    """
    refuse_short(wave_S)
    return np.append(describe_cepstra(mfcc.mfcc(wave_S, COEFFICIENTS)), np.float32(len(wave_S) / audio.RATE_HZ))


def describe_cepstra(c_TC: np.ndarray) -> np.ndarray:
    """The features named by NAMES but for the duration, float32 [65], of MFCCs float32 [T, COEFFICIENTS]."""
    delta_TC = knf.compute_deltas(_deltas(), c_TC)[:, COEFFICIENTS:].astype(np.float64)
    c_TC = c_TC.astype(np.float64)
    blocks = [
        c_TC.mean(axis=0),
        c_TC.std(axis=0),
        delta_TC.std(axis=0),
        np.percentile(c_TC[:, 0], PERCENTILES),
    ]
    return np.concatenate(blocks).astype(np.float32)


def version() -> str:
    """A text that changes when the same waveform may give other values: VERSION and that of mfcc.py."""
    return f"{VERSION} mfcc {mfcc.version()}"


def _deltas() -> knf.DeltaOptions:
    options = knf.DeltaOptions()
    options.order = 1
    options.window = 2
    return options
