"""What the made corpus promises, as numbers: statistics of its labels and settings, and measurements of its waves.

`make.py` redraws until the promises hold and the tests hold the published folder to them, so both read this file.
Letters: N utterances, F features, L labels (activation, valence, dominance), T samples, K frames.
"""

import csv
from pathlib import Path

import numpy as np
from scipy.signal import get_window
from scipy.stats import rankdata

LABELS = ("activation", "valence", "dominance")
RATE_HZ = 16_000
FRAME, HOP = 640, 320  # 40 ms and 20 ms: two periods of the lowest voice fit


def read_manifest(path: Path) -> dict[str, np.ndarray]:
    """Columns of the manifest: strings for the identities, float64 for durations, labels and settings."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = ("path", "speaker", "language", "gender", "text_id")
    return {name: np.array([row[name] for row in rows], dtype=str if name in text else float) for name in rows[0]}


def columns(table: dict[str, np.ndarray], prefix: str = "set_") -> np.ndarray:
    """The settings as (N, F), in the order of the manifest."""
    return np.stack([column for name, column in table.items() if name.startswith(prefix)], axis=1)


def labels(table: dict[str, np.ndarray]) -> np.ndarray:
    """The labels as (N, L)."""
    return np.stack([table[name] for name in LABELS], axis=1)


def ccc(truth_NL: np.ndarray, guess_NL: np.ndarray) -> np.ndarray:
    """Concordance correlation of each column, (L,), with population moments (Lin 1989, Biometrics 45:255)."""
    gap = truth_NL.mean(0) - guess_NL.mean(0)
    covariance = ((truth_NL - truth_NL.mean(0)) * (guess_NL - guess_NL.mean(0))).mean(0)
    return 2 * covariance / (truth_NL.var(0) + guess_NL.var(0) + gap**2)


def spearman(a_NF: np.ndarray, b_NL: np.ndarray) -> np.ndarray:
    """Rank correlation of every column of `a` with every column of `b`, (F, L)."""
    ranks = rankdata(np.concatenate([a_NF, b_NL], axis=1), axis=0)
    return np.corrcoef(ranks, rowvar=False)[: a_NF.shape[1], a_NF.shape[1] :]


def one_hot(names_N: np.ndarray) -> np.ndarray:
    """Indicator columns, (N, number of distinct names)."""
    return (names_N[:, None] == np.unique(names_N)).astype(float)


def left_out_ccc(x_NF: np.ndarray, y_NL: np.ndarray, group_N: np.ndarray, penalty: float = 10.0) -> np.ndarray:
    """Pooled CCC, (L,), of ridge regressions that each predict one group from all the others.

    Columns are standardised by the training groups. A column that is constant there is left out: it says nothing of
    the group left out, as a voice's own indicator does not.
    """
    guess_NL = np.empty_like(y_NL)
    for group in np.unique(group_N):
        test = group_N == group
        mean, std = x_NF[~test].mean(0), x_NF[~test].std(0)
        x = (x_NF[:, std > 0] - mean[std > 0]) / std[std > 0]
        centre = y_NL[~test].mean(0)
        gram = x[~test].T @ x[~test] + penalty * np.eye(x.shape[1])
        guess_NL[test] = centre + x[test] @ np.linalg.solve(gram, x[~test].T @ (y_NL[~test] - centre))
    return ccc(y_NL, guess_NL)


def leak_ccc(table: dict[str, np.ndarray]) -> np.ndarray:
    """Leave-one-voice-out CCC, (L,), from who speaks which text in which language and nothing else."""
    identity = np.concatenate([one_hot(table[name]) for name in ("speaker", "language", "text_id")], axis=1)
    return left_out_ccc(identity, labels(table), table["speaker"])


def oracle_ccc(table: dict[str, np.ndarray]) -> np.ndarray:
    """Leave-one-voice-out CCC, (L,), from the true settings: the ceiling for a linear reader of the audio."""
    return left_out_ccc(columns(table), labels(table), table["speaker"])


def frames(wave_T: np.ndarray) -> np.ndarray:
    """Overlapping frames, (K, FRAME)."""
    return np.lib.stride_tricks.sliding_window_view(wave_T, FRAME)[::HOP]


def active(frames_KT: np.ndarray) -> np.ndarray:
    """Which frames carry speech, (K,): those within 30 dB of the loudest."""
    power = (frames_KT**2).mean(1)
    return power > 1e-3 * power.max()


def active_level_db(wave_T: np.ndarray) -> float:
    """RMS of the speech frames in dB of full scale; pauses do not count."""
    speech = frames(wave_T)
    return float(10 * np.log10((speech[active(speech)] ** 2).mean()))


def pitch_hz(wave_T: np.ndarray) -> np.ndarray:
    """F0 of the voiced frames, in order: the best lag of the autocorrelation divided by the window's (Boersma 1993).

    Enough to tell voices and settings apart; a lag search between 60 and 400 Hz, without path smoothing.
    """
    window = get_window("hann", FRAME)
    speech = frames(wave_T)
    speech = (speech[active(speech)] - speech[active(speech)].mean(1, keepdims=True)) * window

    def autocorrelation(x: np.ndarray) -> np.ndarray:
        return np.fft.irfft(np.abs(np.fft.rfft(x, 2 * FRAME)) ** 2)[..., : FRAME // 2]

    lags = autocorrelation(speech) / autocorrelation(window)
    lags = lags / np.maximum(lags[:, :1], 1e-12)
    low, high = RATE_HZ // 400, RATE_HZ // 60
    octave_cost = 0.05 * np.log2(np.arange(low, high) / low)  # or a multiple of the period would win by a hair
    best = low + (lags[:, low:high] - octave_cost).argmax(1)
    return RATE_HZ / best[lags[np.arange(len(lags)), best] > 0.6]


def functionals(wave_T: np.ndarray) -> np.ndarray:
    """A plain description of one utterance: log-band means and deviations, level, F0, duration and share of speech."""
    speech = frames(wave_T)
    spectrum = np.abs(np.fft.rfft(speech * get_window("hann", FRAME))) ** 2
    edges = np.geomspace(3, FRAME // 2 + 1, 21).astype(int)  # 20 bands from 75 Hz to 8 kHz
    bands = np.log(np.add.reduceat(spectrum, edges[:-1], axis=1)[active(speech)] + 1e-8)
    pitch = np.log2(pitch_hz(wave_T))
    slope = np.polyfit(np.linspace(-0.5, 0.5, len(pitch)), pitch, 1)[0]
    low, middle, high = np.percentile(pitch, [10, 50, 90])
    rest = [active_level_db(wave_T), middle, high - low, slope, len(wave_T) / RATE_HZ, active(speech).mean()]
    return np.concatenate([bands.mean(0), bands.std(0), rest])
