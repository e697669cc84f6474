import math

import numpy as np
import pytest
import scipy.signal
import torch

from cpcscale.errors import UserError
from cpcscale.train.augment import AugmentConfig, add_effects, band_stop

RATE_HZ = 16_000
SAMPLES = 16_000
ROWS = 6
EFFECTS = ("noise_p", "reverb_p", "band_drop_p", "time_drop_p")
BY_FFT = ("reverb_p", "band_drop_p", "all")
OFF = dict.fromkeys(EFFECTS, 0.0)
ALL = AugmentConfig(**dict.fromkeys(EFFECTS, 1.0))
each_effect = pytest.mark.parametrize("spec", [*EFFECTS, "all"])


def only(effect: str, **ranges: list[float]) -> AugmentConfig:
    """One effect on every row, or all of them."""
    return ALL if effect == "all" else AugmentConfig(**{**OFF, effect: 1.0, **ranges})


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keys(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (rows,), generator=random(seed))


def waves(rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(rows, SAMPLES, generator=random(seed))


def whole(rows: int) -> torch.Tensor:
    return torch.full((rows,), SAMPLES)


def heard(wave_BS: torch.Tensor, spec: AugmentConfig, seed: int = 0) -> torch.Tensor:
    return add_effects(wave_BS, keys(len(wave_BS), seed), whole(len(wave_BS)), spec)


def impulse(rows: int, place: int) -> torch.Tensor:
    wave_BS = torch.zeros(rows, SAMPLES)
    wave_BS[:, place] = 1.0
    return wave_BS


def test_it_is_off_unless_asked_for():
    assert not AugmentConfig().past


def test_rows_that_draw_no_effect_come_back_bit_for_bit():
    assert torch.equal(heard(waves(), AugmentConfig(**OFF)), waves())


@each_effect
def test_a_row_is_the_same_alone_in_any_order_and_among_others(spec):
    """Bit for bit where time is dropped, else to the rounding of fp32."""
    wave_BS, key_B, config = waves(), keys(ROWS), only(spec)
    together = add_effects(wave_BS, key_B, whole(ROWS), config)
    assert not torch.equal(together, wave_BS)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = add_effects(wave_BS[order], key_B[order], whole(ROWS), config)
    alone = torch.cat([add_effects(wave_BS[[row]], key_B[[row]], whole(1), config) for row in range(ROWS)])
    tolerance = {"rtol": 0, "atol": 0} if spec == "time_drop_p" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(shuffled, together[order], **tolerance)
    torch.testing.assert_close(alone, together, **tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_effect
def test_a_row_is_the_same_on_every_device(spec):
    on_cpu = heard(waves(), only(spec))
    on_gpu = add_effects(waves().cuda(), keys(ROWS), whole(ROWS), only(spec))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-6, atol=1e-7)


@each_effect
def test_no_generator_has_a_part_in_it(spec):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = heard(waves(), only(spec))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(heard(waves(), only(spec)), first)


@each_effect
def test_rows_with_other_keys_sound_otherwise(spec):
    result_BS = heard(waves(1).expand(ROWS, -1), only(spec))
    assert len({row.numpy().tobytes() for row in result_BS}) == ROWS


@each_effect
@pytest.mark.parametrize("cut", [1, 4321, 9000, SAMPLES - 1])
def test_what_comes_later_changes_nothing_before_it(spec, cut):
    """Where a convolution is by FFT, a result may be rounded to the next number of fp32; else bit for bit."""
    before = heard(waves(), only(spec))[:, :cut]
    tolerance = {"rtol": 2.4e-7, "atol": 1.2e-7} if spec in BY_FFT else {"rtol": 0, "atol": 0}
    for loud in (0.0, 0.1, 100.0):
        changed = waves()
        changed[:, cut:] = loud * torch.randn(ROWS, SAMPLES - cut, generator=random(9))
        torch.testing.assert_close(heard(changed, only(spec))[:, :cut], before, **tolerance)


@pytest.mark.parametrize("effect", EFFECTS)
def test_no_gradient_flows_back_from_a_sample_to_later_ones(effect):
    wave_BS, cut = waves().requires_grad_(), SAMPLES // 3
    # Many samples, of which a time drop can zero some and not all.
    heard(wave_BS, only(effect))[:, cut - 2000 : cut].sum().backward()
    gradient_BS = wave_BS.grad.abs()
    assert (gradient_BS[:, :cut].amax(1) > 0).all()
    assert gradient_BS[:, cut:].max() <= (1e-14 * gradient_BS.max() if effect in BY_FFT else 0)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_an_effect_befalls_its_share_of_the_rows(probability):
    rows = 2000
    wave_BS = torch.ones(rows, 400)
    spec = AugmentConfig(**{**OFF, "time_drop_p": probability, "time_drop_s": [0.01, 0.01]})
    result_BS = add_effects(wave_BS, keys(rows), torch.full((rows,), 400), spec)
    share = (result_BS == 0).any(1).float().mean().item()
    assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / rows))


@pytest.mark.parametrize("other", ["noise_p", "reverb_p", "band_drop_p"])
def test_what_one_effect_draws_does_not_depend_on_another(other):
    spec = {**OFF, "time_drop_p": 0.5, "time_drop_s": [0.02, 0.05]}
    alone = heard(waves(), AugmentConfig(**spec)) == 0
    together = heard(waves(), AugmentConfig(**{**spec, other: 0.5})) == 0
    assert torch.equal(alone, together)
    assert alone.any()


def test_effects_befall_rows_independently():
    rows = 1000
    wave_BS, key_B, samples_B = torch.ones(rows, 400), keys(rows), torch.full((rows,), 400)
    hit = [
        (add_effects(wave_BS, key_B, samples_B, AugmentConfig(**{**OFF, effect: 0.5})) != wave_BS).any(1).float()
        for effect in EFFECTS
    ]
    correlations = torch.corrcoef(torch.stack(hit)) - torch.eye(len(EFFECTS))
    assert correlations.abs().max() < 4 / math.sqrt(rows)


@each_effect
def test_what_is_no_real_audio_stays_silent(spec):
    samples_B = torch.tensor([SAMPLES, 5000, 0, 1, 12_345, 5000])
    real_BS = torch.arange(SAMPLES) < samples_B.unsqueeze(1)
    result_BS = add_effects(waves() * real_BS, keys(ROWS), samples_B, only(spec))
    assert result_BS.isfinite().all()
    assert (result_BS[~real_BS] == 0).all()


@each_effect
def test_silence_stays_silence(spec):
    assert (heard(torch.zeros(ROWS, SAMPLES), only(spec)) == 0).all()


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 30.0])
def test_the_noise_has_its_distance_from_the_signal(snr_db):
    wave_BS = waves()
    noise_BS = heard(wave_BS, only("noise_p", noise_snr_db=[snr_db, snr_db])) - wave_BS
    measured_B = 10 * torch.log10(wave_BS.square().mean(1) / noise_BS.square().mean(1))
    assert (measured_B - snr_db).abs().max() < 1.0


def test_the_noise_is_between_white_and_pink():
    wave_BS = torch.ones(64, SAMPLES)
    noise_BS = heard(wave_BS, only("noise_p")) - wave_BS
    hz_F, power_BF = scipy.signal.welch(noise_BS.double().numpy(), RATE_HZ, nperseg=2048)
    band_F = (hz_F > 100) & (hz_F < 7000)
    slope_B = np.polyfit(np.log(hz_F[band_F]), np.log(power_BF[:, band_F]).T, 1)[0]
    assert -1.15 < slope_B.min() < -0.9
    assert -0.1 < slope_B.max() < 0.15
    assert slope_B.mean() == pytest.approx(-0.5, abs=0.15)


def test_the_noise_can_be_heard():
    noise_BS = heard(torch.ones(ROWS, SAMPLES), only("noise_p")) - 1
    power_BF = torch.fft.rfft(noise_BS.double()).abs().square()
    assert (power_BF[:, :20].amax(1) < 1e-6 * power_BF.mean(1)).all()
    assert (power_BF[:, 20:200].mean(1) > 0.5 * power_BF.mean(1)).all()


@pytest.mark.parametrize("rt60_s", [0.1, 0.4])
@pytest.mark.parametrize("direct_db", [0.0, 10.0])
def test_the_room_keeps_the_direct_path_in_place_and_rings_for_its_time(rt60_s, direct_db):
    spec = only("reverb_p", reverb_rt60_s=[rt60_s, rt60_s], reverb_direct_db=[direct_db, direct_db])
    room_BL = heard(impulse(ROWS, 100), spec)[:, 100:].double()
    assert heard(impulse(ROWS, 100), spec)[:, :100].abs().max() < 1e-12
    torch.testing.assert_close(room_BL[:, 0], torch.ones(ROWS, dtype=torch.float64), rtol=0, atol=1e-6)
    tail_BL = room_BL[:, 1:].square()
    assert (-10 * torch.log10(tail_BL.sum(1)) - direct_db).abs().max() < 1.5
    # Schroeder's integral from -5 to -25 dB, three times its duration.
    left_BL = tail_BL.flip(1).cumsum(1).flip(1)
    left_BL = 10 * torch.log10(left_BL / left_BL[:, :1])
    measured_B = 3 * ((left_BL > -25).sum(1) - (left_BL > -5).sum(1)) / RATE_HZ
    assert (measured_B / rt60_s - 1).abs().max() < 0.2


@pytest.mark.parametrize(("low", "high"), [(100, 200), (100, 1100), (1000, 1100), (3000, 7000), (7400, 7900)])
def test_the_band_stop_is_the_one_that_scipy_designs(low, high):
    taps = 8000
    design = scipy.signal.butter(4, [low, high], "bandstop", fs=RATE_HZ, output="sos")
    expected = scipy.signal.sosfilt(design, np.eye(1, taps)[0])
    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    torch.testing.assert_close(band_stop(*ends, taps)[0], torch.from_numpy(expected), rtol=0, atol=1e-8)


@pytest.mark.parametrize("width_hz", [50.0, 1000.0, 4000.0])
def test_a_dropped_band_has_its_width_and_its_surroundings_stay(width_hz):
    """Below -3 dB within; what rings on beyond the filter's length would spoil the sides."""
    response_BL = heard(impulse(40, 0), only("band_drop_p", band_drop_hz=[width_hz, width_hz]))
    level_BF = 20 * torch.log10(torch.fft.rfft(response_BL.double()).abs().clamp(min=1e-9))
    lost_BF = level_BF < -3.01
    assert (lost_BF.sum(1) - width_hz).abs().max() <= 2
    first_B, last_B = lost_BF.int().argmax(1), lost_BF.shape[1] - 1 - lost_BF.flip(1).int().argmax(1)
    assert ((last_B - first_B + 1) == lost_BF.sum(1)).all()
    assert first_B.min() >= 99
    assert last_B.max() <= 7901
    assert level_BF.max() < 0.01
    # Evenly on the mel scale: half of the bands begin below its middle.
    assert 700 < first_B.double().median() < 3500


def test_time_is_dropped_in_one_span_of_its_length_anywhere():
    rows = 300
    samples_B = torch.full((rows,), 8000)
    dropped_BS = heard_ones(rows, samples_B)[:, :8000] == 0
    length_B = dropped_BS.sum(1)
    start_B, end_B = dropped_BS.int().argmax(1), 8000 - dropped_BS.flip(1).int().argmax(1)
    assert torch.equal(end_B - start_B, length_B)
    cut_B = end_B == 8000
    assert ((length_B >= 320) | cut_B).all()
    assert length_B.max() < 800
    assert length_B[~cut_B].float().mean() == pytest.approx(560, abs=40)
    assert start_B.float().mean() == pytest.approx(4000, abs=500)


def heard_ones(rows: int, samples_B: torch.Tensor) -> torch.Tensor:
    return add_effects(torch.ones(rows, SAMPLES), keys(rows), samples_B, only("time_drop_p", time_drop_s=[0.02, 0.05]))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        *(({name: value}, f"augment.{name}={value}") for name in EFFECTS for value in (-0.1, 1.5, math.nan)),
        ({"noise_snr_db": [20.0, 5.0]}, "augment.noise_snr_db"),
        ({"noise_snr_db": [5.0]}, "augment.noise_snr_db"),
        ({"noise_snr_db": [math.nan, 5.0]}, "augment.noise_snr_db"),
        ({"reverb_rt60_s": [0.0, 1.0]}, "augment.reverb_rt60_s"),
        ({"reverb_rt60_s": [0.1, 60.0]}, "augment.reverb_rt60_s"),
        ({"reverb_direct_db": [1.0, 0.0]}, "augment.reverb_direct_db"),
        ({"band_drop_hz": [0.0, 100.0]}, "augment.band_drop_hz"),
        ({"band_drop_hz": [100.0, 8000.0]}, "augment.band_drop_hz"),
        ({"time_drop_s": [-0.1, 0.1]}, "augment.time_drop_s"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(bad, words):
    with pytest.raises(UserError, match=words):
        AugmentConfig(**bad)
