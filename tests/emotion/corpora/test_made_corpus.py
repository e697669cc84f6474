"""The made corpus keeps the promises of its README: nothing but the sound gives a label away, and the sound does."""

import importlib.util
import re
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

FOLDER = Path(__file__).parents[2] / "data" / "made_emotion"


def load_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("made_emotion_check", FOLDER / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load_check()


@pytest.fixture(scope="module")
def table() -> dict[str, np.ndarray]:
    return check.read_manifest(FOLDER / "manifest.csv")


@pytest.fixture(scope="module")
def decoded(table: dict[str, np.ndarray]) -> list[tuple[np.ndarray, int]]:
    return [soundfile.read(FOLDER / path) for path in table["path"]]


@pytest.fixture(scope="module")
def functionals(decoded: list[tuple[np.ndarray, int]]) -> np.ndarray:
    return np.stack([check.functionals(wave) for wave, _ in decoded])


def readme_row(start: str) -> np.ndarray:
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith(f"| {start}"))
    return np.array([float(cell) for cell in re.findall(r"-?\.\d+", row)])


def test_no_setting_gives_a_label_away(table: dict[str, np.ndarray]) -> None:
    ranks = np.abs(check.spearman(check.columns(table), check.labels(table)))
    assert ranks.shape == (8, 3)
    assert ranks.max() < 0.6
    np.testing.assert_allclose(ranks.max(0), readme_row("largest absolute Spearman"), atol=0.002)


def test_labels_are_independent_and_alike_for_every_voice(table: dict[str, np.ndarray]) -> None:
    labels = check.labels(table)
    assert labels.min() >= 1 and labels.max() <= 5
    assert np.abs(check.spearman(labels, labels) - np.eye(3)).max() < 0.1
    by_voice = np.stack([np.sort(labels[table["speaker"] == voice], axis=0) for voice in np.unique(table["speaker"])])
    assert by_voice.mean(1).std(0).max() < 0.05
    assert by_voice.std(1).std(0).max() < 0.05


def test_voice_language_and_text_alone_predict_nothing(table: dict[str, np.ndarray]) -> None:
    leak = check.leak_ccc(table)
    assert np.abs(leak).max() < 0.05
    np.testing.assert_allclose(leak, readme_row("CCC from voice"), atol=0.002)


def test_oracle_ceiling_is_what_the_readme_says(table: dict[str, np.ndarray]) -> None:
    oracle = check.oracle_ccc(table)
    assert oracle.min() > 0.7 and oracle.max() < 0.9
    np.testing.assert_allclose(oracle, readme_row("oracle CCC"), atol=0.002)


def test_plain_functionals_hear_every_label_and_stay_under_the_ceiling(
    table: dict[str, np.ndarray], functionals: np.ndarray
) -> None:
    heard = check.left_out_ccc(functionals, check.labels(table), table["speaker"])
    assert heard.min() > 0.3
    assert np.all(heard < check.oracle_ccc(table))
    np.testing.assert_allclose(heard, readme_row("CCC from 46 plain functionals"), atol=0.02)


def test_every_file_decodes_in_range_without_clipping(
    table: dict[str, np.ndarray], decoded: list[tuple[np.ndarray, int]]
) -> None:
    assert sorted(table["path"]) == sorted(f"audio/{file.name}" for file in (FOLDER / "audio").iterdir())
    for (wave, rate), seconds in zip(decoded, table["duration_s"], strict=True):
        assert rate == check.RATE_HZ and wave.ndim == 1
        assert abs(len(wave) / rate - seconds) < 1e-3
        assert 2 <= seconds <= 6
        assert 0.01 < np.abs(wave).max() < 10 ** (-1 / 20)


def test_loudness_in_the_files_is_the_setting(
    table: dict[str, np.ndarray], decoded: list[tuple[np.ndarray, int]]
) -> None:
    over = np.array([check.active_level_db(wave) for wave, _ in decoded]) - table["set_loudness_db"]
    for voice in np.unique(table["speaker"]):
        assert over[table["speaker"] == voice].std() < 0.5  # dB; the codec adds a little


def test_there_are_enough_voices_languages_and_utterances(table: dict[str, np.ndarray]) -> None:
    voices = defaultdict(set)
    for speaker, language in zip(table["speaker"], table["language"], strict=True):
        voices[language].add(speaker)
    assert len(voices) >= 4
    assert min(len(speakers) for speakers in voices.values()) >= 2
    assert sum(len(speakers) for speakers in voices.values()) == len(np.unique(table["speaker"])) >= 12
    assert min(np.unique(table["speaker"], return_counts=True)[1]) >= 30


def test_every_voice_has_its_own_base_pitch(
    table: dict[str, np.ndarray], decoded: list[tuple[np.ndarray, int]]
) -> None:
    pitch = defaultdict(list)
    for speaker, (wave, _) in zip(table["speaker"], decoded, strict=True):
        pitch[speaker].append(np.median(check.pitch_hz(wave)))
    semitones = 12 * np.log2(np.sort([np.median(values) for values in pitch.values()]))
    assert np.diff(semitones).min() > 0.5
    assert semitones[-1] - semitones[0] > 12


def test_the_folder_stays_under_five_megabytes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 5_000_000
