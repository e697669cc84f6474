"""Regenerate the made emotion corpus: `python make.py` beside `texts.csv` rewrites `manifest.csv` and `audio/`.

The labels are drawn first, with the same marginals for every voice and without a look at voice, language or text.
Each setting of the synthesiser is then a linear mix of the labels plus noise, relative to the voice's own base, so
that no setting gives a label away and all of them together nearly determine it. Needs espeak-ng on the path.
"""

import csv
import io
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import check
import numpy as np
import soundfile
from scipy.signal import get_window, resample_poly
from scipy.stats import truncnorm

HERE = Path(__file__).parent
SEED = 20240
REPEATS = 2  # each voice says each text of its language twice
LABEL = truncnorm(-2, 2, loc=3, scale=1)  # on the scale 1 to 5
PEAK = 10 ** (-1 / 20)
MARGIN_S = 0.2  # silence before and after
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Voice:
    """A speaker: an espeak-ng voice and the base from which its settings depart."""

    speaker: str
    language: str
    gender: str
    espeak: str
    pitch: int  # espeak-ng's 0 to 99
    rate_wpm: int
    level_db: float  # RMS of the speech frames, dB of full scale


# A variant (after the +) needs the name of a voice file: after "en-gb" or "fr-fr" espeak-ng 1.51 drops it in silence.
VOICES = (
    Voice("made_en_1", "en", "male", "en+m8", 46, 172, -32.0),
    Voice("made_en_2", "en", "female", "en-us+f2", 50, 180, -33.5),
    Voice("made_en_3", "en", "male", "en+m2", 59, 165, -32.5),
    Voice("made_de_1", "de", "male", "de+m1", 45, 178, -33.0),
    Voice("made_de_2", "de", "female", "de+f1", 44, 170, -31.5),
    Voice("made_de_3", "de", "female", "de+Annie", 54, 184, -32.5),
    Voice("made_fr_1", "fr", "male", "fr+m3", 54, 166, -32.0),
    Voice("made_fr_2", "fr", "female", "fr+f4", 50, 162, -33.0),
    Voice("made_es_1", "es", "male", "es+Gene2", 60, 182, -31.5),
    Voice("made_es_2", "es", "female", "es+linda", 47, 174, -33.5),
    Voice("made_it_1", "it", "male", "it+m6", 48, 186, -33.0),
    Voice("made_it_2", "it", "female", "it+f5", 52, 177, -32.0),
    Voice("made_ru_1", "ru", "male", "ru+adam", 65, 160, -34.5),
    Voice("made_ru_2", "ru", "female", "ru+aunty", 41, 168, -32.5),
)


@dataclass(frozen=True)
class Setting:
    """One dial of the synthesis: `centre + spread * (weights . z + noise)`, where the whole bracket has unit power.

    `z` are activation, valence and dominance as z-scores.
    """

    centre: float
    spread: float
    weights: tuple[float, float, float]
    decimals: int


# No weight exceeds .5, which keeps every |Spearman| under .6 in a sample of this size.
SETTINGS = {
    "set_rate_wpm": Setting(0, 20, (0.50, 0.30, 0.35), 0),
    "set_loudness_db": Setting(0, 3.5, (0.50, -0.20, 0.45), 2),
    "set_pitch": Setting(0, 9, (0.45, 0.35, -0.45), 0),
    "set_pitch_range": Setting(50, 17, (0.40, 0.45, 0.40), 0),
    "set_contour": Setting(0, 18, (-0.20, 0.45, -0.50), 0),
    "set_tilt_db_octave": Setting(0, 1.5, (0.45, -0.40, 0.45), 2),
    "set_breath_db": Setting(-24, 4, (-0.40, 0.40, -0.45), 2),
    "set_pause_ms": Setting(300, 90, (-0.45, -0.40, -0.40), 0),
}


def read_texts() -> dict[str, dict[str, list[str]]]:
    """Texts as language -> text_id -> phrases."""
    texts: dict[str, dict[str, list[str]]] = {}
    with (HERE / "texts.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            texts.setdefault(row["language"], {})[row["text_id"]] = row["text"].split(" | ")
    return texts


def draw_labels(rng: np.random.Generator, count: int) -> np.ndarray:
    """Labels of one voice, (count, L): one value from each of `count` equal slices of the marginal, in random order."""
    order = np.stack([rng.permutation(count) for _ in check.LABELS], axis=1)
    return LABEL.ppf((order + rng.random(order.shape)) / count).round(2)


def draw_table(rng: np.random.Generator, texts: dict[str, dict[str, list[str]]]) -> dict[str, np.ndarray]:
    """Identities and labels of every utterance, redrawn until chance links no label to another or to an identity."""
    rows = [(v.speaker, v.language, v.gender, t) for v in VOICES for t in list(texts[v.language]) * REPEATS]
    table = dict(zip(("speaker", "language", "gender", "text_id"), np.array(rows).T, strict=True))
    while True:
        drawn = np.concatenate([draw_labels(rng, int((table["speaker"] == v.speaker).sum())) for v in VOICES])
        table |= dict(zip(check.LABELS, drawn.T, strict=True))
        between = np.abs(check.spearman(drawn, drawn) - np.eye(3)).max()
        if between < 0.08 and np.abs(check.leak_ccc(table)).max() < 0.03:
            return table


def draw_settings(rng: np.random.Generator, labels_NL: np.ndarray) -> dict[str, np.ndarray]:
    """Every setting of every utterance, clipped at 2.2 spreads so that the extremes stay intelligible and unclipped."""
    z_NL = (labels_NL - LABEL.mean()) / LABEL.std()
    drawn = {}
    for name, setting in SETTINGS.items():
        weights = np.array(setting.weights)
        score = z_NL @ weights + np.sqrt(1 - weights @ weights) * rng.standard_normal(len(z_NL))
        drawn[name] = (setting.centre + setting.spread * score.clip(-2.2, 2.2)).round(setting.decimals) + 0.0
    return drawn


def speak(voice: Voice, text: str, rate_wpm: int) -> np.ndarray:
    """One phrase from espeak-ng at 16 kHz, without the silence around it."""
    # -a 40: some voices clip inside espeak-ng at its default of 100, which no later scaling could undo.
    command = ["espeak-ng", "-v", voice.espeak, "-s", str(rate_wpm), "-a", "40", "--stdout", text]
    wave, rate = soundfile.read(io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout))
    wave = resample_poly(wave, check.RATE_HZ, rate)
    loud = np.flatnonzero(np.abs(wave) > 0.005 * np.abs(wave).max())
    return wave[loud[0] : loud[-1] + 1]


def phrases_with_pitch(voice: Voice, phrases: list[str], settings: dict[str, float]) -> list[str]:
    """The phrases with espeak-ng's inline pitch command before each word: base, shift and the slope over the text."""
    total = sum(len(phrase.split()) for phrase in phrases)
    positions = iter(np.linspace(-0.5, 0.5, total))
    marked = []
    for phrase in phrases:
        words = []
        for word in phrase.split():
            pitch = voice.pitch + settings["set_pitch"] + next(positions) * settings["set_contour"]
            words.append(f"\x01{round(np.clip(pitch, 0, 99))}P{word}")
        marked.append(f"\x01{settings['set_pitch_range']:.0f}R" + " ".join(words))
    return marked


def tilt(wave_T: np.ndarray, db_octave: float) -> np.ndarray:
    """The wave with a constant slope added to its spectrum around 1 kHz, flat below 100 Hz; zero phase."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(wave_T), 1 / check.RATE_HZ), 100) / 1000)
    return np.fft.irfft(np.fft.rfft(wave_T) * 10 ** (db_octave * octaves / 20), len(wave_T))


def breath(wave_T: np.ndarray, level_db: float, rng: np.random.Generator) -> np.ndarray:
    """The wave with rising-spectrum noise that follows its envelope, `level_db` against it."""
    window = get_window("hann", 320)
    envelope = np.sqrt(np.convolve(wave_T**2, window / window.sum(), "same").clip(0))
    noise = np.diff(rng.standard_normal(len(wave_T) + 1)) / np.sqrt(2)  # first difference: +6 dB an octave
    return wave_T + 10 ** (level_db / 20) * envelope * noise


def render(voice: Voice, phrases: list[str], settings: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """One utterance at 16 kHz with its settings; raises ValueError where it would come within 1 dB of full scale."""
    pause = np.zeros(round(settings["set_pause_ms"] / 1000 * check.RATE_HZ))
    margin = np.zeros(round(MARGIN_S * check.RATE_HZ))
    rate = voice.rate_wpm + round(settings["set_rate_wpm"])
    pieces = [margin]
    for phrase in phrases_with_pitch(voice, phrases, settings):
        pieces += [speak(voice, phrase, rate), pause]
    wave = np.concatenate([*pieces[:-1], margin])
    wave = breath(tilt(wave, settings["set_tilt_db_octave"]), settings["set_breath_db"], rng)
    target_db = voice.level_db + settings["set_loudness_db"]
    wave *= 10 ** ((target_db - check.active_level_db(wave)) / 20)
    if np.abs(wave).max() > PEAK:
        raise ValueError(f"peak {np.abs(wave).max():.2f} over {PEAK:.2f} in {voice.speaker}: lower its level_db")
    return wave


def ogg_checksum(page: bytes) -> int:
    """The checksum of an Ogg page (RFC 3533, section 6): zlib's CRC-32 with bits reversed and nothing inverted."""
    reflected = zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def with_serial(ogg: bytes, serial: int) -> bytes:
    """The same Ogg stream under a serial number of ours: libsndfile draws one from the clock, so no two runs agree."""
    pages, start = [], 0
    while start < len(ogg):
        segments = ogg[start + 26]
        size = 27 + segments + sum(ogg[start + 27 : start + 27 + segments])
        page = bytearray(ogg[start : start + size])
        page[14:18], page[22:26] = struct.pack("<I", serial), bytes(4)
        page[22:26] = struct.pack("<I", ogg_checksum(bytes(page)))
        pages.append(bytes(page))
        start += size
    return b"".join(pages)


def write_opus(path: Path, wave_T: np.ndarray, serial: int) -> None:
    """Ogg Opus at about 22 kbit/s, the same bytes for the same wave."""
    buffer = io.BytesIO()
    level = 1 - (22_000 - 6_000) / 250_000  # libsndfile maps 0 to 256 kbit/s and 1 to 6 kbit/s, linearly
    soundfile.write(buffer, wave_T, check.RATE_HZ, format="OGG", subtype="OPUS", compression_level=level)
    path.write_bytes(with_serial(buffer.getvalue(), serial))


def main() -> None:
    """Draw, synthesise, write, and print the figures that the README quotes."""
    rng = np.random.default_rng(SEED)
    texts = read_texts()
    table = draw_table(rng, texts)
    settings = draw_settings(rng, check.labels(table))
    voices = {voice.speaker: voice for voice in VOICES}
    shutil.rmtree(HERE / "audio", ignore_errors=True)
    (HERE / "audio").mkdir()
    takes = Counter[str]()
    table |= {"path": np.empty(len(table["speaker"]), "U40"), "duration_s": np.zeros(len(table["speaker"]))}
    for n, (speaker, text_id) in enumerate(zip(table["speaker"], table["text_id"], strict=True)):
        voice = voices[speaker]
        one = {name: float(column[n]) for name, column in settings.items()}
        wave = render(voice, texts[voice.language][text_id], one, np.random.default_rng([SEED, n]))
        table["path"][n] = f"audio/{speaker}_{takes[speaker]:02d}.opus"
        table["duration_s"][n] = round(len(wave) / check.RATE_HZ, 4)
        takes[speaker] += 1
        write_opus(HERE / table["path"][n], wave, serial=n + 1)  # 0 troubles some readers
    order = ("path", "speaker", "language", "gender", "duration_s", *check.LABELS, "text_id")
    table = {name: table[name] for name in order} | settings
    with (HERE / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))
    ranks = check.spearman(check.columns(table), check.labels(table))
    print("largest |Spearman| of a setting with a label:", np.abs(ranks).max().round(3))
    print("CCC from voice, language and text:", check.leak_ccc(table).round(3))
    print("CCC from the true settings:", check.oracle_ccc(table).round(3))


if __name__ == "__main__":
    main()
