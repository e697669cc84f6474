"""Promises of labelled audio: every sample heard, no file read or decoded twice, bad files named in one line."""

from __future__ import annotations

import itertools
import logging
import math
import mmap
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from trees import noise, write_tree

from cpcscale import audio, storage
from cpcscale.emotion.audio import from_files
from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.audio.windows import CachedFeatures, Waves, compute_features, window_shares, window_spans
from cpcscale.emotion.corpora.corpus import NO_AUDIO, Corpus, DroppedRow, Utterance
from cpcscale.errors import UserError

# Of the five files, one is over three windows of 1 s and one shorter than a window.
SECONDS = {"b": 0.9, "a": 0.3, "long": 3.3, "d": 1.0, "e": 0.7}


def corpus_of(folder: Path | str, names: list[str], suffix: str = "flac") -> Corpus:
    rows = (Utterance(name, storage.join(str(folder), f"{name}.{suffix}"), "s", (3.0, 3.0, 3.0)) for name in names)
    return Corpus("made", (), (1.0, 5.0), tuple(rows))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    files = {f"{name}.flac": noise(seconds, seed) for seed, (name, seconds) in enumerate(SECONDS.items())}
    return corpus_of(write_tree(tmp_path / "audio", files), list(SECONDS))


@pytest.fixture
def settings(tmp_path: Path) -> AudioCacheConfig:
    return AudioCacheConfig(path=str(tmp_path / "cache"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled as soon as they are written."""
    monkeypatch.setattr(from_files, "_SETTLED_NS", -(10**12))


class Counted:
    """How often what is read and what is decoded, and what was handed to `compute`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read, self.decoded, self.computed = list[str](), 0, list[list[int]]()
        read, decode = storage.read, audio.decode_checked

        def reading_(url: str) -> bytes:
            self.read.append(Path(url).stem)
            return read(url)

        def decoding(data: bytes) -> tuple[audio.AudioInfo, np.ndarray]:
            self.decoded += 1
            return decode(data)

        monkeypatch.setattr(storage, "read", reading_)
        monkeypatch.setattr(audio, "decode_checked", decoding)

    def compute(self, windows: list[np.ndarray]) -> list[np.ndarray]:
        self.computed.append([len(window) for window in windows])
        return [doubled(window) for window in windows]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def doubled(window: np.ndarray) -> np.ndarray:
    return np.stack([window[::160] * 2.0, window[::160] + 1.0], axis=1).astype(np.float32)


def doubled_all(windows: list[np.ndarray]) -> list[np.ndarray]:
    return [doubled(window) for window in windows]


def same(made: CachedFeatures, waves: Waves) -> None:
    for row, windows in enumerate(waves):
        assert len(made[row]) == len(windows)
        for got, window in zip(made[row], windows, strict=True):
            np.testing.assert_array_equal(got, doubled(window))


@given(samples=st.integers(1, 2000), most=st.integers(1, 300))
def test_windows_cover_every_sample_overlap_by_half_and_end_with_the_utterance(samples, most):
    windows = window_spans(samples, most)
    counts = np.zeros(samples, int)
    for start, stop in windows:
        assert stop - start == min(most, samples)
        counts[start:stop] += 1
    assert counts.min() >= 1
    assert (windows[0][0], windows[-1][1]) == (0, samples)
    starts = [start for start, _ in windows]
    assert all(0 < step <= max(1, most // 2) for step in np.diff(starts))
    assert set(np.diff(starts[:-1])) <= {max(1, most // 2)}
    assert (len(windows) == 1) == (samples <= most)


@given(samples=st.integers(1, 2000), most=st.integers(2, 300))
def test_shares_give_each_sample_the_same_weight(samples, most):
    windows = window_spans(samples, most)
    held_WS = np.array([(start <= np.arange(samples)) & (np.arange(samples) < stop) for start, stop in windows])
    np.testing.assert_allclose(window_shares(windows), (held_WS / held_WS.sum(axis=0)).mean(axis=1))


def test_utterances_come_in_the_corpuss_order_as_they_decode(corpus, settings):
    waves = Waves.open(corpus, settings)
    assert len(waves) == 5
    for row, utterance in zip(waves, corpus.utterances, strict=True):
        (window,) = row
        np.testing.assert_array_equal(window, audio.to_int16(audio.decode(storage.read(utterance.path))))


def test_other_rates_and_channels_come_as_16_khz_mono(tmp_path, settings):
    stereo_S2 = np.stack([noise(1.0, 1), noise(1.0, 2)], axis=1)
    soundfile.write(tmp_path / "one.wav", stereo_S2, 32_000)
    waves = Waves.open(corpus_of(tmp_path, ["one"], "wav"), settings)
    assert (waves.samples(0), waves[0][0].dtype) == (8_000, np.int16)


def test_an_utterance_of_5_minutes_is_overlapping_windows_and_one_shorter_than_a_window_is_itself(tmp_path, settings):
    files = {"minutes.wav": noise(300.2, 1), "short.wav": noise(0.1, 2)}
    waves = Waves.open(corpus_of(write_tree(tmp_path / "audio", files), ["minutes", "short"], "wav"), settings)
    minutes, short = waves
    assert [len(window) for window in minutes] == [160_000] * 60
    np.testing.assert_array_equal(
        np.concatenate([w[:80_000] for w in minutes[:-1]]), files["minutes.wav"][: 59 * 80_000]
    )
    np.testing.assert_array_equal(minutes[-1], files["minutes.wav"][-160_000:])
    assert waves.shares(0).sum() == pytest.approx(1)
    np.testing.assert_array_equal(short[0], files["short.wav"])
    assert waves.shares(1).tolist() == [1.0]


def parts_of(path: Path | str, edges: list[float]) -> Corpus:
    rows = (
        Utterance(f"{first}", str(path), "s", (3.0, 3.0, 3.0), segment=(first, last))
        for first, last in itertools.pairwise(edges)
    )
    return Corpus("made", (), (1.0, 5.0), tuple(rows))


@given(cuts=st.lists(st.integers(1, 29), unique=True, max_size=5), rate_hz=st.sampled_from([16_000, 22_050]))
def test_parts_of_a_file_are_exactly_its_audio_wherever_it_is_cut(tmp_path_factory, cuts, rate_hz):
    folder = tmp_path_factory.mktemp("parts")
    soundfile.write(folder / "a.flac", noise(3.0 * rate_hz / 16_000), rate_hz)
    edges = [0.0, *(cut / 10 for cut in sorted(cuts)), math.inf]
    waves = Waves.open(parts_of(folder / "a.flac", edges), AudioCacheConfig(path=str(folder / "cache")))
    whole = audio.to_int16(audio.decode(str(folder / "a.flac")))
    np.testing.assert_array_equal(np.concatenate([waves.whole(row) for row in range(len(waves))]), whole)
    assert [waves.samples(row) for row in range(len(cuts))] == [
        round(last * 16_000) - round(first * 16_000) for first, last in itertools.pairwise(edges[:-1])
    ]


def test_parts_are_decoded_once_a_file_and_kept_by_their_place(tmp_path, settings, settled, counted):
    path = write_tree(tmp_path, {"a.flac": noise(2.0)}) / "a.flac"
    first = Waves.open(parts_of(path, [0.0, 0.5, 1.0]), settings)
    assert (counted.read, counted.decoded) == (["a"], 1)
    again = Waves.open(parts_of(path, [0.0, 0.5, 1.0]), settings)
    assert counted.read == ["a"]
    assert again.digests == first.digests
    moved = Waves.open(parts_of(path, [0.0, 0.6, 1.0]), settings)
    assert not set(moved.digests) & set(first.digests)
    np.testing.assert_array_equal(moved.whole(1), noise(2.0)[9_600:16_000])
    # A part that the cache lost is made again from its file.
    lost = Waves.open(parts_of(path, [0.5, 1.0]), replace(settings, path=str(tmp_path / "other")))
    (pack,) = (tmp_path / "other").rglob("*.safetensors")
    with pack.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    np.testing.assert_array_equal(lost.whole(0), noise(2.0)[8_000:16_000])
    arrived = pickle.loads(pickle.dumps(moved))  # noqa: S301
    np.testing.assert_array_equal(arrived.whole(0), noise(2.0)[:9_600])


def test_a_part_behind_the_end_of_its_file_or_too_short_is_bad_and_one_that_is_rounded_is_not(tmp_path, settings):
    path = write_tree(tmp_path, {"a.flac": noise(2.0)}) / "a.flac"
    with pytest.raises(UserError, match=r"2 of 3 .*\(2 outside\).* it is 1 s to 2\.5 s of a file of 2\.000 s"):
        Waves.open(parts_of(path, [0.0, 1.0, 2.5, 3.0]), settings)
    with pytest.raises(UserError, match=r"1 of 2 .*\(1 short\)"):
        Waves.open(parts_of(path, [0.0, 0.05, 2.0]), settings)
    assert Waves.open(parts_of(path, [1.0, 2.05]), settings).samples(0) == 16_000


def test_a_window_shorter_than_an_encoder_needs_repeats_itself(corpus, settings):
    plain = Waves.open(corpus, settings)
    waves = plain.at_least(10_000)
    assert [len(row[0]) for row in waves] == [14_400, 10_000, 52_800, 16_000, 11_200]
    np.testing.assert_array_equal(waves[1][0], np.concatenate([plain[1][0]] * 3)[:10_000])
    assert len(plain[1][0]) == 4_800


def test_a_window_is_mapped_and_not_loaded(corpus, settings):
    part = Waves.open(corpus, settings, max_s=1.0)[2][1]
    while isinstance(part, np.ndarray):
        part = part.base
    assert isinstance(part, mmap.mmap)


def test_a_second_start_opens_no_audio_file(corpus, settings, settled, counted):
    first = Waves.open(corpus, settings)
    assert sorted(counted.read) == sorted(SECONDS)
    second = Waves.open(corpus, settings)
    assert len(counted.read) == counted.decoded == 5
    assert all((one[0] == two[0]).all() for one, two in zip(first, second, strict=True))


def test_a_file_that_changed_so_lately_that_it_may_again_is_read_again_and_not_decoded(corpus, settings, counted):
    for _ in range(2):
        Waves.open(corpus, settings)
    assert (len(counted.read), counted.decoded) == (10, 5)


def test_a_changed_file_is_noticed_though_its_size_and_date_are_kept(tmp_path, settings, settled):
    corpus = corpus_of(write_tree(tmp_path / "audio", {"one.wav": noise(1.0, 1)}), ["one"], "wav")
    path = Path(corpus.utterances[0].path)
    Waves.open(corpus, settings)
    date = path.stat().st_mtime_ns
    path.write_bytes(audio.encode(noise(1.0, 2), "wav"))
    os.utime(path, ns=(date, date))
    np.testing.assert_array_equal(Waves.open(corpus, settings)[0][0], noise(1.0, 2))


def test_moved_and_copied_files_are_not_decoded_again(corpus, settings, settled, counted, tmp_path):
    Waves.open(corpus, settings)
    (tmp_path / "audio").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "copy.flac").write_bytes((tmp_path / "elsewhere" / "a.flac").read_bytes())
    waves = Waves.open(corpus_of(tmp_path / "elsewhere", [*SECONDS, "copy"]), settings)
    assert counted.decoded == 5
    np.testing.assert_array_equal(waves[5][0], waves[1][0])


def test_only_added_utterances_are_decoded_and_computed(corpus, settings, settled, counted, tmp_path):
    compute_features("double", "1", Waves.open(corpus, settings), counted.compute)
    assert (counted.decoded, sum(map(len, counted.computed))) == (5, 5)
    write_tree(tmp_path / "audio", {"new.flac": noise(0.5, 9)})
    waves = Waves.open(corpus_of(tmp_path / "audio", ["new", *SECONDS]), settings)
    made = compute_features("double", "1", waves, counted.compute)
    assert counted.decoded == 6
    assert counted.computed[1:] == [[8_000]]
    same(made, waves)


def test_features_are_computed_once_for_each_thing_they_depend_on(corpus, settings, settled, counted):
    waves = Waves.open(corpus, settings)
    for name, digest, heard, windows in [
        ("double", "1", waves, 5),
        ("double", "1", Waves.open(corpus, settings).take([3, 0]), 0),
        ("double", "2", waves, 5),
        ("twice", "1", waves, 5),
        # Two utterances are shorter than this, and one is longer than a second.
        ("double", "1", waves.at_least(12_000), 2),
        ("double", "1", Waves.open(corpus, settings, max_s=1.0), 6),
    ]:
        for _ in range(2):
            same(compute_features(name, digest, heard, counted.compute), heard)
        assert sum(map(len, counted.computed)) == windows
        counted.computed.clear()


def test_batches_are_of_like_length_and_of_a_minute_at_most(tmp_path, settings, counted):
    seconds = [9.0, 1.0] * 10 + [80.0]
    files = {f"{number}.wav": noise(length, number) for number, length in enumerate(seconds)}
    names = [str(number) for number in range(len(seconds))]
    waves = Waves.open(corpus_of(write_tree(tmp_path / "audio", files), names, "wav"), settings, max_s=90.0)
    same(compute_features("double", "1", waves, counted.compute), waves)
    short, rest = [16_000] * 10, [144_000] * 6
    assert counted.computed == [short, rest, rest[:4], [1_280_000]]


@pytest.mark.parametrize("what", ["waves", "double"])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_changes_nothing(what, place, bit, tmp_path_factory):
    root = tmp_path_factory.mktemp("flip")
    files = {"one.wav": noise(0.2, 1), "two.wav": noise(0.15, 2)}
    corpus = corpus_of(write_tree(root / "audio", files), ["one", "two"], "wav")
    settings = AudioCacheConfig(path=str(root / "cache"))
    compute_features("double", "1", Waves.open(corpus, settings), doubled_all)
    (pack,) = (root / "cache").glob(f"emotion/{what}-*/*.safetensors")
    data = bytearray(pack.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    pack.write_bytes(data)
    for _ in range(2):
        waves = Waves.open(corpus, settings)
        made = compute_features("double", "1", waves, doubled_all)
        for row, wave in enumerate(files.values()):
            np.testing.assert_array_equal(waves[row][0], wave)
            np.testing.assert_array_equal(made[row][0], doubled(wave))


def test_what_the_cache_loses_is_not_made_of_a_file_that_changed_since(tmp_path, settings):
    corpus = corpus_of(write_tree(tmp_path / "audio", {"one.wav": noise(0.2, 1)}), ["one"], "wav")
    waves = Waves.open(corpus, settings)
    (pack,) = Path(settings.path).glob("emotion/waves-*/*.safetensors")
    with pack.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    write_tree(tmp_path / "audio", {"one.wav": noise(0.2, 2)})
    with pytest.raises(UserError, match=r"one\.wav in corpus made was changed since"):
        waves[0]


def broken(root: Path) -> Corpus:
    files = {
        "good.wav": noise(0.5, 1),
        "empty.wav": b"",
        "headed.wav": audio.encode(np.zeros(0, np.int16), "wav"),
        "text.wav": b"not audio at all",
        "blink.wav": noise(0.05, 2),
        "fine.wav": noise(0.6, 3),
    }
    names = ["missing", *(name[:-4] for name in files)]
    return corpus_of(write_tree(root / "audio", files), names, "wav")


def test_bad_files_stop_with_one_line_that_counts_them_and_names_the_first(tmp_path, settings):
    with pytest.raises(UserError) as raised:
        Waves.open(broken(tmp_path), settings)
    line = str(raised.value)
    assert "\n" not in line
    assert "5 of 7 audio files cannot be used (1 missing, 2 empty, 1 unreadable, 1 short)" in line
    assert f"the first {tmp_path}/audio/missing.wav" in line
    assert "corpus.on_bad=skip" in line


def test_bad_files_are_skipped_with_a_line_each_and_join_what_was_dropped(tmp_path, settings, caplog):
    corpus = broken(tmp_path)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            waves = Waves.open(corpus, settings, on_bad="skip")
        assert [row.key for row in waves.corpus.utterances] == ["good", "fine"]
        assert [len(windows[0]) for windows in waves] == [8_000, 9_600]
        assert [(one.key, one.cause) for one in waves.bad] == [
            ("missing", "missing"),
            ("empty", "empty"),
            ("headed", "empty"),
            ("text", "unreadable"),
            ("blink", "short"),
        ]
        assert waves.corpus.dropped[0] == DroppedRow("missing", NO_AUDIO)
        assert waves.corpus.dropped_counts["empty audio file"] == 2
        assert [line.split(",")[0] for line in caplog.messages] == [f"made: left out {one.key}" for one in waves.bad]


def test_a_corpus_without_one_good_file_is_refused_also_where_bad_ones_are_skipped(tmp_path, settings):
    with pytest.raises(UserError, match=r"1 of 1 audio files cannot be used .* no utterance is left"):
        Waves.open(corpus_of(tmp_path, ["missing"]), settings, on_bad="skip")


def test_pickled_waves_and_features_are_small_and_open_again_where_they_arrive(corpus, settings, settled):
    waves = Waves.open(corpus, settings, max_s=1.0).at_least(8_000)
    made = compute_features("double", "1", waves, doubled_all)
    sent = pickle.dumps(made)
    assert len(sent) < 5_000
    arrived = pickle.loads(sent)  # noqa: S301 - our own bytes
    assert isinstance(arrived, CachedFeatures)
    assert arrived.waves.least_samples == 8_000
    for row in range(5):
        for one, two in zip(arrived[row], made[row], strict=True):
            np.testing.assert_array_equal(one, two)
    assert len(arrived[1:3]) == 2


def test_waves_that_arrive_where_the_audio_is_another_are_refused(tmp_path, settings):
    corpus = corpus_of(write_tree(tmp_path / "audio", {"one.wav": noise(0.2, 1)}), ["one"], "wav")
    sent = pickle.dumps(Waves.open(corpus, settings))
    write_tree(tmp_path / "audio", {"one.wav": noise(0.2, 2)})
    with pytest.raises(UserError, match=r"one\.wav in corpus made was changed since"):
        pickle.loads(sent)  # noqa: S301 - our own bytes


def test_part_of_a_corpus_has_its_own_rows(corpus, settings):
    waves = Waves.open(corpus, settings, max_s=1.0)
    part = waves.take([2, 0])
    assert [row.key for row in part.corpus.utterances] == ["long", "b"]
    assert [len(windows) for windows in part] == [6, 1]
    assert [row.key for row in waves[1:3].corpus.utterances] == ["a", "long"]


def test_audio_of_a_store_is_fetched_once_and_again_when_it_is_replaced(s3, settings, counted, tmp_path):
    base = f"{s3.base}/waves/{tmp_path.name}"
    for seed in (1, 2):
        storage.write(f"{base}/{seed}.wav", audio.encode(noise(0.5, seed), "wav"))
    corpus = corpus_of(base, ["1", "2"], "wav")
    for _ in range(2):
        waves = Waves.open(corpus, settings)
        np.testing.assert_array_equal(waves[1][0], noise(0.5, 2))
    assert sorted(counted.read) == ["1", "2"]
    storage.write(f"{base}/2.wav", audio.encode(noise(0.5, 3), "wav"))
    np.testing.assert_array_equal(Waves.open(corpus, settings)[1][0], noise(0.5, 3))
    assert counted.decoded == 3


def test_an_object_that_is_missing_is_bad_and_a_store_that_is_away_is_an_error(s3, settings, tmp_path, monkeypatch):
    base = f"{s3.base}/waves/{tmp_path.name}"
    storage.write(f"{base}/1.wav", audio.encode(noise(0.5, 1), "wav"))
    waves = Waves.open(corpus_of(base, ["1", "2"], "wav"), settings, on_bad="skip")
    assert [(one.key, one.cause) for one in waves.bad] == [("2", "missing")]

    def away(url: str) -> bytes:
        raise UserError(f"{url} cannot be read")

    monkeypatch.setattr(storage, "read", away)
    storage.write(f"{base}/2.wav", audio.encode(noise(0.5, 2), "wav"))
    with pytest.raises(UserError, match="cannot be read"):
        Waves.open(corpus_of(base, ["1", "2"], "wav"), settings, on_bad="skip")
