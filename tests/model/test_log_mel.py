"""The log-mel front end: what its frames are, that nothing later or beside them changes them, and its constants."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpcscale import config
from cpcscale.errors import UserError
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig
from cpcscale.model.log_mel import HOP, MOST_BANDS, WINDOW, LogMel, mel_filters

FRONT = LogMel(40)
seeds = st.integers(0, 2**31)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.integers(0, 9 * HOP), st.floats(1e-3, 30))
def test_frame_t_is_of_the_25_ms_that_end_with_its_hop_and_begins_with_zeros(seed, samples, level):
    wave_S = level * noise(seed, samples)
    found_TM = FRONT(wave_S[None])[0].double().numpy()
    assert len(found_TM) == samples // HOP
    padded = np.concatenate([np.zeros(WINDOW), wave_S.double().numpy()])
    hann_W = np.sin(np.pi * (np.arange(WINDOW) + 0.5) / WINDOW) ** 2
    for t, found_M in enumerate(found_TM):
        spectrum_P = np.fft.rfft(padded[(t + 1) * HOP : (t + 1) * HOP + WINDOW] * hann_W)
        energy_M = np.abs(spectrum_P) ** 2 @ mel_filters(40) / np.square(hann_W).sum()
        np.testing.assert_allclose(found_M, np.log(energy_M + 1e-6), atol=1e-3)


@given(seeds, st.integers(0, 11))
def test_what_comes_later_changes_no_bit_of_a_frame(seed, frame):
    wave_BS, other_BS = noise(seed, 2, 12 * HOP), noise(seed + 1, 2, 12 * HOP)
    until = (frame + 1) * HOP
    other_BS[:, :until] = wave_BS[:, :until]
    assert torch.equal(FRONT(wave_BS)[:, : frame + 1], FRONT(other_BS)[:, : frame + 1])


@given(seeds, st.lists(st.integers(1, 8 * HOP), min_size=1, max_size=4), st.integers(0, 1000))
def test_a_row_has_its_frames_in_any_batch_and_before_any_padding(seed, lengths, more):
    rows = [noise(seed + n, 1, length) for n, length in enumerate(lengths)]
    batch_BS = torch.zeros(len(rows), max(lengths) + more)
    for whole_S, row in zip(batch_BS, rows, strict=True):
        whole_S[: row.shape[1]] = row[0]
    for whole_TM, row in zip(FRONT(batch_BS), rows, strict=True):
        torch.testing.assert_close(whole_TM[: row.shape[1] // HOP], FRONT(row)[0], rtol=0, atol=2e-6)


def test_white_noise_has_the_same_energy_in_all_bands_and_silence_the_floor():
    energy_M = FRONT.log_energy(noise(0, 1, 100_000))[0, 3:].exp().mean(dim=0)
    torch.testing.assert_close(energy_M, torch.ones(40), rtol=0, atol=0.12)
    torch.testing.assert_close(FRONT(torch.zeros(1, HOP)), torch.full((1, 1, 40), 1e-6).log())


@pytest.mark.parametrize("bands", [1, 20, 40, MOST_BANDS])
def test_each_band_weighs_some_points_and_a_tone_is_in_the_band_around_it(bands):
    weight_PM = mel_filters(bands)
    np.testing.assert_allclose(weight_PM.sum(axis=0), 1)
    centre_hz = weight_PM.T @ np.fft.rfftfreq(WINDOW, 1 / 16_000)
    assert (np.diff(centre_hz) > 0).all()
    for band in (0, bands // 2, bands - 1):
        tone_S = torch.sin(2 * np.pi * centre_hz[band] / 16_000 * torch.arange(4000))
        assert abs(int(LogMel(bands)(tone_S[None])[0, 10].argmax()) - band) <= 1


def test_bands_without_a_frequency_are_refused_with_the_most_that_have_one():
    with pytest.raises(UserError, match=r"model\.encoder\.bands=76 .* use at most 75"):
        EncoderConfig(kind="logmel", bands=76)


def test_layers_that_are_meant_for_samples_are_refused_with_those_for_log_mel():
    with pytest.raises(UserError, match=r"strides=\[5, 4, 4, 2\] are those of samples.*1\.6 s.*kernels=\[3\]"):
        EncoderConfig(kind="logmel", kernels=[10, 8, 8, 4], strides=[5, 4, 4, 2])


def test_calibrated_bands_have_zero_mean_and_unit_variance_over_the_corpus_and_loudness_stays():
    model = config.build(ModelConfig, {"encoder": {"kind": "logmel", "channels": 8}, "context": {"width": 8}})
    network = build(model, 0, offset=0.01, gain=9.0)
    waves = [(300 + level * noise(level, 4000)).short().numpy() for level in (300, 1000, 3000)]
    network.calibrate(iter(waves))
    scaled = [(torch.from_numpy(wave_S).float() / 32768 - 0.01) * 9 for wave_S in waves]
    rows = [network.encoder.front(wave_S[None])[0] for wave_S in scaled]
    every_TM = torch.cat(rows)
    torch.testing.assert_close(every_TM.mean(dim=0), torch.zeros(40), rtol=0, atol=1e-4)
    torch.testing.assert_close(every_TM.std(dim=0, correction=0), torch.ones(40), rtol=0, atol=1e-4)
    assert rows[0].mean() < rows[1].mean() - 1 < rows[2].mean() - 2
    assert set(network.constants) == {"offset", "gain", "encoder.front.mean", "encoder.front.deviation"}
    # One of the same architecture begins from the same constants.
    for name, tensor in network.untrained(5).constants.items():
        assert torch.equal(tensor, network.constants[name])
    assert not torch.equal(network.untrained(5).encoder.layers[0].weight, network.encoder.layers[0].weight)


def test_silence_and_nothing_at_all_leave_the_bands_finite():
    front = LogMel(4)
    front.measure([])
    assert front.mean.tolist() == [0] * 4 and front.deviation.tolist() == [1] * 4
    front.measure([torch.zeros(800), torch.zeros(10)])
    assert front.deviation.tolist() == [1] * 4 and not front(torch.zeros(1, 800)).any()


def test_an_encoder_of_the_waveform_reads_no_audio_to_know_its_level():
    def unread() -> Iterator[np.ndarray]:
        raise AssertionError("it was read")
        yield

    build(ModelConfig(), 0).calibrate(unread())
