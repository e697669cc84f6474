"""Prosodic features of an utterance: statistics of pitch, energy, speaking rate and voicing. Pure.

There are two kinds; `choose_kind` says which is used, and results state it:

- `egemaps`: the 88 functionals of eGeMAPS v02 (Eyben et al. 2016, IEEE Trans. Affective Computing 7), by openSMILE, the
  optional extra `opensmile`. Its licence is audEERING's: research and private use; no product without another licence.
- `pitch`: the 32 functionals of NAMES, with F0 and voicing by Kaldi's pitch tracker (Ghahremani et al., ICASSP 2014).
"""

from __future__ import annotations

import importlib.metadata
import logging
from functools import cache
from typing import Any

import kaldi_native_fbank as knf
import numpy as np

from cpcscale import audio, config
from cpcscale.errors import UserError
from cpcscale.handmade.mfcc import refuse_short

log = logging.getLogger(__name__)

KINDS = ("auto", "egemaps", "pitch")
LICENCE = (
    "openSMILE is under the audEERING research licence: not for commercial use, nor are models made from its features"
)
_SPREAD = ("mean", "deviation", "percentile_10", "percentile_50", "percentile_90", "range")
# F0 slopes are between adjacent voiced frames, energy slopes between all; a run is voiced frames without a gap.
NAMES = (
    *(f"f0_{name}_st" for name in _SPREAD),
    *(f"f0_{name}_st_per_frame" for name in ("rise", "fall", "slope", "slope_deviation", "slope_size")),
    *(f"energy_{name}_db" for name in _SPREAD),
    *(f"energy_{name}_db_per_frame" for name in ("rise", "fall", "slope_size")),
    "energy_voiced_mean_db",
    "voiced_share",
    "correlation_mean",
    "correlation_voiced_mean",
    "correlation_voiced_deviation",
    "voiced_runs_per_s",
    "voiced_run_mean_s",
    "voiced_run_deviation_s",
    "pause_mean_s",
    "pause_deviation_s",
    "syllables_per_s",
    "duration_s",
)

_HOP = audio.RATE_HZ // 100
_WINDOW = audio.RATE_HZ // 40
_LOWEST_HZ, _HIGHEST_HZ = 60.0, 500.0
# Semitones are relative to this, as in eGeMAPS.
_BASE_HZ = 27.5
# The square of one step of 16-bit audio: the energy of digital silence.
_FLOOR = 2.0**-30


# Raise it when `prosody` gives other values.
VERSION = 1


def choose_kind(kind: str) -> str:
    """egemaps or pitch; `auto` is egemaps if openSMILE is installed, else pitch.

    Raises UserError for another word, and for egemaps without openSMILE.
    """
    config.check_choice("prosody", kind, KINDS)
    match kind, _installed():
        case ("egemaps" | "auto", True):
            log.info("prosody by eGeMAPS: %s", LICENCE)
            return "egemaps"
        case "egemaps", False:
            raise UserError(
                f"prosody=egemaps needs openSMILE: pip install 'cpcscale[opensmile]', or prosody=pitch; {LICENCE}"
            )
        case _:
            return "pitch"


def version(kind: str) -> str:
    """A text that changes when the same waveform may give other values: VERSION, kind and the library's version."""
    library = "opensmile" if kind == "egemaps" else "kaldi-native-fbank"
    return f"{VERSION} {kind} {library} {importlib.metadata.version(library)}"


def feature_names(kind: str) -> tuple[str, ...]:
    """The names of the features of a kind, in the order of `prosody`."""
    return tuple(_smile().feature_names) if kind == "egemaps" else NAMES


def prosody(wave_S: np.ndarray, kind: str) -> np.ndarray:
    """The features `feature_names(kind)`, float32 [F], of a float waveform in [-1, 1) at 16 kHz.

    `kind` comes from `choose_kind`. Features that are undefined (the pitch of a whisper) are 0, as in eGeMAPS. Raises
    UserError for less than 0.1 s.
    """
    match kind:
        case "egemaps":
            refuse_short(wave_S)
            return _smile().process_signal(wave_S, audio.RATE_HZ).to_numpy(np.float32)[0]
        case _:
            f0_T, correlation_T, voiced_T = track_pitch(wave_S)
            energy_T = frame_energy(wave_S, len(f0_T))
            return describe_tracks(f0_T, correlation_T, voiced_T, energy_T, len(wave_S) / audio.RATE_HZ)


def track_pitch(wave_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(F0 in Hz, correlation, voiced) of each frame of 10 ms, [T] each, T = S // 160 or one less.

    Correlation is the normalised cross-correlation at the pitch lag, in [0, 1]. A frame is voiced when Kaldi's
    probability of voicing, a function of the correlation fitted to laryngograph data, is above one half. F0
    has a value in unvoiced frames too. Raises UserError for less than 0.1 s.
    """
    # On a few tens of milliseconds, the tracker (1.23.0, snip_edges off) writes out of bounds.
    refuse_short(wave_S)
    options = knf.PitchExtractionOptions()
    options.samp_freq = audio.RATE_HZ
    options.min_f0, options.max_f0 = _LOWEST_HZ, _HIGHEST_HZ
    options.snip_edges = False
    process = knf.ProcessPitchOptions()
    process.add_raw_log_pitch = True
    process.add_normalized_log_pitch = process.add_delta_pitch = False
    found_T2 = knf.compute_and_process_kaldi_pitch(options, process, (wave_S * 32768).tolist())
    found_T2 = found_T2[: len(wave_S) // _HOP].astype(np.float64)
    # Kaldi's first column is 2 ((1.0001 - correlation)^0.15 - 1).
    correlation_T = np.clip(1.0001 - (found_T2[:, 0] / process.pov_scale + 1) ** (1 / 0.15), 0, 1)
    return np.exp(found_T2[:, 1]), correlation_T, _voicing_logit(correlation_T) > 0


def _voicing_logit(n: np.ndarray) -> np.ndarray:
    # NccfToPov of Kaldi's pitch-functions.cc.
    return -5.2 + 5.4 * np.exp(7.5 * (n - 1)) + 4.8 * n - 2 * np.exp(-10 * n) + 4.2 * np.exp(20 * (n - 1))


def frame_energy(wave_S: np.ndarray, frames: int) -> np.ndarray:
    """Energy in dB re full scale, [T], of 25 ms centred on each of `frames` hops of 10 ms; at least -90.3."""
    padded = np.pad(wave_S.astype(np.float64), (_WINDOW - _HOP) // 2)
    windows_TS = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][:frames]
    return 10 * np.log10(np.maximum(np.square(windows_TS).mean(axis=1), _FLOOR))


def count_syllables(energy_T: np.ndarray, voiced_T: np.ndarray) -> int:
    """The number of syllable nuclei: voiced peaks of the smoothed energy that rise 2 dB above the dips beside them.

    After de Jong & Wempe 2009, Behavior Research Methods 41.
    """
    # Takes a while, which other systems need not wait for.
    from scipy.signal import find_peaks

    window = np.hanning(11)
    smooth_T = np.convolve(np.pad(energy_T, 5, mode="edge"), window / window.sum(), mode="valid")
    peaks, _ = find_peaks(smooth_T, prominence=2)
    return int(voiced_T[peaks].sum())


def describe_tracks(
    f0_T: np.ndarray, correlation_T: np.ndarray, voiced_T: np.ndarray, energy_T: np.ndarray, seconds: float
) -> np.ndarray:
    """The features NAMES, float32 [32], of the tracks of `track_pitch` and `frame_energy`."""
    st_T = 12 * np.log2(f0_T / _BASE_HZ)
    slope_f0 = np.diff(st_T)[voiced_T[1:] & voiced_T[:-1]]
    slope_energy = np.diff(energy_T)
    runs_s, pauses_s = _lengths(voiced_T) / 100, _lengths(~voiced_T) / 100
    correlation_voiced = correlation_T[voiced_T]
    slopes = {
        "f0_rise_st_per_frame": _mean(slope_f0[slope_f0 > 0]),
        "f0_fall_st_per_frame": _mean(slope_f0[slope_f0 < 0]),
        "f0_slope_st_per_frame": _mean(slope_f0),
        "f0_slope_deviation_st_per_frame": _deviation(slope_f0),
        "f0_slope_size_st_per_frame": _mean(np.abs(slope_f0)),
        "energy_rise_db_per_frame": _mean(slope_energy[slope_energy > 0]),
        "energy_fall_db_per_frame": _mean(slope_energy[slope_energy < 0]),
        "energy_slope_size_db_per_frame": _mean(np.abs(slope_energy)),
    }
    voicing = {
        "energy_voiced_mean_db": _mean(energy_T[voiced_T]),
        "voiced_share": _mean(voiced_T),
        "correlation_mean": _mean(correlation_T),
        "correlation_voiced_mean": _mean(correlation_voiced),
        "correlation_voiced_deviation": _deviation(correlation_voiced),
        "voiced_runs_per_s": len(runs_s) / seconds,
        "voiced_run_mean_s": _mean(runs_s),
        "voiced_run_deviation_s": _deviation(runs_s),
        "pause_mean_s": _mean(pauses_s),
        "pause_deviation_s": _deviation(pauses_s),
        "syllables_per_s": count_syllables(energy_T, voiced_T) / seconds,
        "duration_s": seconds,
    }
    measured = _spread("f0_{}_st", st_T[voiced_T]) | _spread("energy_{}_db", energy_T) | slopes | voicing
    return np.array([measured[name] for name in NAMES], np.float32)


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, (10, 50, 90)) if len(values) else (0.0, 0.0, 0.0)
    measured = (_mean(values), _deviation(values), low, middle, high, high - low)
    return {name.format(part): float(value) for part, value in zip(_SPREAD, measured, strict=True)}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _deviation(values: np.ndarray) -> float:
    return float(values.std()) if len(values) else 0.0


def _lengths(true_T: np.ndarray) -> np.ndarray:
    """The number of frames of each unbroken run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], true_T, [False]]).astype(np.int8)))
    return edges[1::2] - edges[::2]


def _installed() -> bool:
    try:
        import opensmile  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _smile() -> Any:
    import opensmile

    return opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals, num_workers=1)
