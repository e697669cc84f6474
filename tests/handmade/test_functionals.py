import numpy as np
import pytest

from cpcscale.errors import UserError
from cpcscale.handmade.functionals import COEFFICIENTS, NAMES, functionals
from cpcscale.handmade.mfcc import mfcc


def noise(samples: int, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)


def named(wave_S: np.ndarray) -> dict[str, float]:
    return dict(zip(NAMES, functionals(wave_S).tolist(), strict=True))


def test_each_feature_has_a_name_of_its_own():
    assert functionals(noise(16_000)).shape == (len(NAMES),) == (66,)
    assert functionals(noise(16_000)).dtype == np.float32
    assert len(set(NAMES)) == len(NAMES)


def test_they_are_the_statistics_that_their_names_say():
    wave_S = noise(8000)
    c_TC, found = mfcc(wave_S, COEFFICIENTS), named(wave_S)
    for number in (0, 7, 19):
        assert found[f"c{number}_mean"] == pytest.approx(c_TC[:, number].mean(), abs=1e-3)
        assert found[f"c{number}_deviation"] == pytest.approx(c_TC[:, number].std(), rel=1e-4)
        # Least-squares slopes of five frames; the edge frame is repeated outwards.
        padded = np.pad(c_TC[:, number].astype(np.float64), 2, mode="edge")
        slopes = [np.polyfit(np.arange(-2, 3), padded[t : t + 5], 1)[0] for t in range(len(c_TC))]
        assert found[f"c{number}_delta_deviation"] == pytest.approx(np.std(slopes), rel=1e-3)
    for percent in (5, 25, 50, 75, 95):
        assert found[f"c0_percentile_{percent}"] == pytest.approx(np.percentile(c_TC[:, 0], percent), abs=1e-3)
    assert found["duration_s"] == 0.5


def test_a_louder_utterance_moves_c0_and_nothing_else():
    quiet, loud = named(noise(16_000, 0.02)), named(noise(16_000, 0.2))
    moved = {name for name in NAMES if abs(loud[name] - quiet[name]) > 1e-2}
    assert moved == {"c0_mean", *(name for name in NAMES if name.startswith("c0_percentile"))}


@pytest.mark.parametrize(
    "wave_S",
    [noise(1600), np.zeros(16_000, np.float32), np.ones(16_000, np.float32), np.sign(noise(4000))],
    ids=["the shortest", "silence", "a constant", "full scale"],
)
def test_any_utterance_long_enough_gives_finite_features(wave_S):
    assert np.isfinite(functionals(wave_S)).all()


@pytest.mark.parametrize("samples", [0, 1, 1599])
def test_an_utterance_under_a_tenth_of_a_second_is_refused(samples):
    with pytest.raises(UserError, match=rf"an utterance of {samples / 16_000:.3f} s is too short"):
        functionals(noise(samples))
