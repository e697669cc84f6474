"""Hand-made features for the baselines: MFCC and log-mel at 100 frames/s, by kaldi-native-fbank."""

from __future__ import annotations

import kaldi_native_fbank as knf
import numpy as np

from cpcscale import audio
from cpcscale.errors import UserError

# Raise it when `mfcc` or `log_mel` gives other values: cached features are then computed again. tests/golden fails if
# values change and VERSION does not.
VERSION = 1
_MELS = 80
# Samples that Kaldi is given at a time: it takes them as Python's floats.
_PIECE = 60 * audio.RATE_HZ
# Shorter speech has too few frames for percentiles and rates.
LEAST_S = 0.1


def mfcc(wave_S: audio.Sliced, coefficients: int = 40) -> np.ndarray:
    """Kaldi's MFCC, float32 [T, coefficients], of a float waveform in [-1, 1): 25 ms windows every 10 ms, no dither.

    T = S // 160, as for the CPC encoder: each frame is centred on its 10 ms, and the ends are mirrored.
    """
    options = knf.MfccOptions()
    options.num_ceps = coefficients
    options.use_energy = False
    _shared(options)
    return _frames(knf.OnlineMfcc(options), wave_S, coefficients)


def log_mel(wave_S: audio.Sliced, bands: int = 40) -> np.ndarray:
    """Kaldi's log mel filterbank energies, float32 [T, bands], of a float waveform in [-1, 1); frames as in `mfcc`."""
    options = knf.FbankOptions()
    _shared(options)
    options.mel_opts.num_bins = bands
    return _frames(knf.OnlineFbank(options), wave_S, bands)


def refuse_short(wave_S: audio.Sliced) -> None:
    """Raises UserError for a waveform at 16 kHz shorter than LEAST_S seconds."""
    if len(wave_S) < LEAST_S * audio.RATE_HZ:
        raise UserError(
            f"an utterance of {len(wave_S) / audio.RATE_HZ:.3f} s is too short for functionals (at least {LEAST_S} s): "
            "drop its row from the corpus"
        )


def version() -> str:
    """A text that changes when the same waveform may give other values: VERSION and the library's version."""
    return f"{VERSION} kaldi-native-fbank {knf.__version__}"


def _shared(options: knf.MfccOptions | knf.FbankOptions) -> None:
    options.frame_opts.samp_freq = audio.RATE_HZ
    options.frame_opts.dither = 0.0
    # False: frames are centred on their 10 ms and mirrored at the ends, so S samples give S / 160 frames, rounded.
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = _MELS


def _frames(computer: knf.OnlineMfcc | knf.OnlineFbank, wave_S: audio.Sliced, width: int) -> np.ndarray:
    found_TC = np.empty((len(wave_S) // (audio.RATE_HZ // 100), width), np.float32)
    known = 0
    for start in range(0, len(wave_S), _PIECE):
        # Kaldi's scale is that of 16-bit integers; its energy floor assumes it.
        computer.accept_waveform(audio.RATE_HZ, (wave_S[start : start + _PIECE] * 32768).tolist())
        if start + _PIECE >= len(wave_S):
            computer.input_finished()
        ready = min(len(found_TC), computer.num_frames_ready)
        for number in range(known, ready):
            found_TC[number] = computer.get_frame(number)
        known = ready
    return found_TC[:known]
