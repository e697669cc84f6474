"""Promises of a labelled corpus in shards: the results of its files bit for bit, little of it in memory, one line for
what is not there."""

from __future__ import annotations

import logging
import pickle
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_voices import put_corpus, recipe
from trees import noise, write_tree

from cpcscale import audio, storage
from cpcscale.emotion import batching
from cpcscale.emotion.audio.array_cache import AudioCacheConfig
from cpcscale.emotion.audio.windows import Waves
from cpcscale.emotion.batching import predict
from cpcscale.emotion.corpora import open_corpus
from cpcscale.emotion.corpora.corpus import NO_AUDIO, Corpus, CorpusConfig, DroppedRow
from cpcscale.emotion.crossval import run_fold
from cpcscale.emotion.heads.attention import AttentionHead, AttentionHeadConfig, EncoderWithHead
from cpcscale.emotion.heads.training import FitConfig, HeadTraining, TrainingExamples
from cpcscale.emotion.inputs import prepare
from cpcscale.emotion.recipe import EmotionRecipe
from cpcscale.errors import UserError
from cpcscale.model.context import ContextConfig
from cpcscale.model.cpc import ModelConfig, build
from cpcscale.model.encoder import EncoderConfig
from cpcscale.shards.adoption.adopt import exclude_from
from cpcscale.shards.pack import PackConfig, pack

# Never cut: the labels are of whole utterances. Small shards, so that there are several.
WHOLE = PackConfig(min_s=0.1, max_s=0, shard_mb=0.1)


def in_shards(settings: EmotionRecipe, shards: Path | str, **changes) -> EmotionRecipe:
    return replace(settings, corpus=replace(settings.corpus, shards=str(shards), **changes))


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder with labels and audio, shard sets of the audio)."""
    root = tmp_path_factory.mktemp("sharded")
    folder = put_corpus(root / "tones")
    pack(str(folder), str(root / "shards"), WHOLE)
    return folder, root / "shards"


@pytest.mark.parametrize("system", ["precpc", "raw", "random"])
def test_a_fold_from_shards_is_that_from_files_bit_for_bit(tones, checkpoint, tmp_path, system):
    """Frozen features, a network trained on waveforms, and features of a network that the fold itself makes.

    Each with a cache of its own: windows that are there already change what is encoded together, and so the last bit.
    """
    folder, shards = tones
    settings = recipe(folder, system, "" if system == "random" else checkpoint)
    settings = replace(settings, corpus=replace(settings.corpus, max_s=0.4))
    both = [
        replace(each, audio_cache=AudioCacheConfig(path=str(tmp_path / f"cache{number}")))
        for number, each in enumerate((settings, in_shards(settings, shards)))
    ]
    results = [run_fold(each, prepare(each, open_corpus(each.corpus)), 1) for each in both]
    np.testing.assert_array_equal(results[0].guess_UP, results[1].guess_UP)
    assert results[0].curve == results[1].curve
    assert len(results[0].curve) == 2


@pytest.mark.parametrize("packed", ["folder", "folder above"])
def test_labels_alone_are_enough_where_the_audio_is_in_shards(tones, tmp_path, packed):
    folder, _ = tones
    source = folder if packed == "folder" else folder.parent / "above"
    if packed == "folder above" and not source.exists():
        shutil.copytree(folder, source / "tones")
    pack(str(source), str(tmp_path / "shards"), WHOLE)
    (tmp_path / "tones").mkdir()
    shutil.copy(folder / "manifest.csv", tmp_path / "tones")
    settings = CorpusConfig(path=str(tmp_path / "tones"), shards=str(tmp_path / "shards" / "train"))
    waves = Waves.open(open_corpus(settings), recipe(folder, "raw").audio_cache)
    files = open_corpus(CorpusConfig(path=str(folder)))
    assert [one.key for one in waves.corpus.utterances] == [one.key for one in files.utterances]
    assert waves.corpus.digest == files.digest
    for (window,), one in zip(waves, files.utterances, strict=True):
        np.testing.assert_array_equal(window, audio.to_int16(audio.decode(one.path)))


def test_parts_of_a_file_are_those_of_its_member(tmp_path):
    write_tree(tmp_path / "long", {"a/u\u0308.wav": noise(3.0), "b.wav": noise(1.0, 1)})
    rows = "".join(f"a/\u00fc.wav,{n},s,1,2,3,{n},{n + 1}\n" for n in range(3)) + "b.wav,3,s,1,2,3,,\n"
    (tmp_path / "long" / "t.csv").write_text("path,utterance,speaker,activation,valence,dominance,start,end\n" + rows)
    pack(str(tmp_path / "long"), str(tmp_path / "shards"), PackConfig(max_s=0))
    for shards in ("", str(tmp_path / "shards")):
        corpus = open_corpus(CorpusConfig(path=str(tmp_path / "long"), shards=shards))
        waves = Waves.open(corpus, AudioCacheConfig(path=str(tmp_path / "cache")), max_s=0.6)
        assert len(set(waves.digests)) == 4
        for row in range(3):
            np.testing.assert_array_equal(waves.whole(row), noise(3.0)[row * 16_000 :][:16_000])
            np.testing.assert_array_equal(waves.window(row, 1), waves.whole(row)[slice(*waves.spans(row)[1])])
        np.testing.assert_array_equal(waves.whole(3), noise(1.0, 1))


def test_windows_of_a_long_utterance_are_those_of_its_file(tmp_path):
    files = {"long.flac": noise(3.3, 1), "short.wav": noise(0.15, 2)}
    corpora = made(tmp_path, files)
    for corpus in corpora:
        waves = Waves.open(corpus, recipe(tmp_path, "raw").audio_cache, max_s=1.0).at_least(4_000)
        assert [len(windows) for windows in waves] == [6, 1]
        for number in range(6):
            start, stop = waves.spans(0)[number]
            np.testing.assert_array_equal(waves.window(0, number), files["long.flac"][start:stop])
            np.testing.assert_array_equal(waves[0][number], files["long.flac"][start:stop])
        np.testing.assert_array_equal(waves[1][0], np.resize(files["short.wav"], 4_000))


def made(root: Path, files: dict[str, np.ndarray], **settings) -> tuple[Corpus, Corpus]:
    """The corpus of these files, and the same in shards."""
    folder = write_tree(root / "audio", files)
    lines = [f"{name},s{number % 2},3,{1 + number % 5},2" for number, name in enumerate(files)]
    (folder / "manifest.csv").write_text("\n".join(["path,speaker,activation,valence,dominance", *lines]) + "\n")
    pack(str(folder), str(root / "shards"), WHOLE)
    config = CorpusConfig(path=str(folder), **settings)
    return open_corpus(config), open_corpus(replace(config, shards=str(root / "shards")))


class Alive:
    """Decoded samples that are referred to, and the most there were at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.decoded = 0
        decode = audio.decode_slice

        def counting(*arguments: object) -> np.ndarray:
            wave = decode(*arguments)  # type: ignore[arg-type]
            # The part that others refer to, whatever view of it they have.
            self.now, self.decoded = self.now + len(wave), self.decoded + 1
            self.most = max(self.most, self.now)
            weakref.finalize(wave, self._gone, len(wave))
            return wave

        monkeypatch.setattr(audio, "decode_slice", counting)

    def _gone(self, samples: int) -> None:
        self.now -= samples


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    """An epoch and predictions of 40 and of 320 utterances of 0.15 s each hold as much: batches, not the corpus."""
    monkeypatch.setattr(batching, "_CHUNK", 8)
    monkeypatch.setattr(batching, "_READ_AHEAD", 8)
    most = []
    for count in (40, 320):
        _, corpus = made(tmp_path / str(count), {f"{number}.wav": noise(0.15, number) for number in range(count)})
        waves = Waves.open(corpus, recipe(tmp_path, "raw").audio_cache)
        alive = Alive(monkeypatch)
        model = ModelConfig(encoder=EncoderConfig(channels=4), context=ContextConfig(width=5))
        head = AttentionHead(AttentionHeadConfig(heads=1, hidden=4, dense=4), 5)
        data = TrainingExamples(waves, corpus.to_unit(corpus.labels_UP))
        fit = HeadTraining(
            EncoderWithHead(build(model, seed=0), head), data, data, FitConfig(epochs=1, batch=4, device="cpu"), seed=0
        )
        (epoch,) = fit
        assert epoch.updates == count / 4
        predict(fit.network, waves, fit.device)
        assert alive.decoded == 3 * count
        assert alive.now == 0
        most.append(alive.most / (0.15 * audio.RATE_HZ))
    # Four batches of 4 ahead and the one at hand; or a chunk of 8 at hand and another, with 8 more, ahead.
    assert max(most) <= 32
    assert most[1] < 320 / 8


def test_shards_of_a_store_are_kept_whole_where_they_fit_and_read_member_by_member_where_not(
    s3, tones, tmp_path, caplog
):
    folder, shards = tones
    base = f"{s3.base}/labelled/{tmp_path.name}"
    for name in storage.list_files(str(shards / "train")):
        storage.write(f"{base}/{name}", storage.read(storage.join(str(shards / "train"), name)))
    files = open_corpus(CorpusConfig(path=str(folder)))
    for limit_gb, words in ((1.0, ""), (1e-6, "reading each utterance by itself")):
        settings = replace(recipe(folder, "raw").audio_cache, path=str(tmp_path / f"{limit_gb}"), limit_gb=limit_gb)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            waves = Waves.open(open_corpus(CorpusConfig(path=str(folder), shards=base)), settings)
        assert words in caplog.text and bool(caplog.text) == bool(words)
        for (window,), one in zip(waves, files.utterances, strict=True):
            np.testing.assert_array_equal(window, audio.to_int16(audio.decode(one.path)))


def test_pickled_waves_in_shards_hold_no_audio_and_open_again_where_they_arrive(tones):
    folder, shards = tones
    settings = in_shards(recipe(folder, "raw"), shards)
    waves = Waves.open(open_corpus(settings.corpus), settings.audio_cache).at_least(5_000).take([4, 0])
    sent = pickle.dumps(waves)
    assert len(sent) < 5_000
    arrived = pickle.loads(sent)  # noqa: S301 - our own bytes
    assert arrived.digests == waves.digests
    for one, two in zip(arrived, waves, strict=True):
        np.testing.assert_array_equal(one[0], two[0])


@pytest.fixture
def spoilt(tones, tmp_path) -> tuple[EmotionRecipe, list[Path]]:
    """A recipe over a copy of the shards, and their tars."""
    folder, shards = tones
    shutil.copytree(shards / "train", tmp_path / "train")
    return in_shards(recipe(folder, "raw"), tmp_path / "train"), sorted((tmp_path / "train").glob("*.tar"))


def test_a_shard_that_is_missing_or_cut_is_refused_before_anything_is_read(spoilt):
    settings, tars = spoilt
    assert len(tars) > 2
    data = tars[1].read_bytes()
    tars[1].write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{tars[1]} has {len(data) - 1} bytes, but its index says {len(data)}"):
        prepare(settings, open_corpus(settings.corpus))
    tars[1].unlink()
    with pytest.raises(UserError, match=rf"{tars[1]} is missing: restore the shard") as raised:
        prepare(settings, open_corpus(settings.corpus))
    assert "\n" not in str(raised.value)


def test_bytes_that_are_not_what_was_indexed_stop_the_run_with_a_line_that_names_the_shard(spoilt):
    settings, tars = spoilt
    prepared = prepare(settings, open_corpus(settings.corpus))
    for tar in tars:
        data = bytearray(tar.read_bytes())
        data[700:-700] = bytes(len(data) - 1400)
        tar.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-\d+\.tar: bytes \d+\.\.\d+ fail their checksum 3 times") as raised:
        run_fold(settings, prepared, 0)
    assert "\n" not in str(raised.value)


def test_utterances_that_are_not_in_the_shards_are_one_line_or_are_skipped_and_counted(tones, tmp_path):
    folder, shards = tones
    shutil.copytree(shards / "train", tmp_path / "train")
    exclude_from(str(tmp_path / "train"), ["03", "05"])
    settings = in_shards(recipe(folder, "raw"), tmp_path / "train")
    with pytest.raises(UserError, match=r"2 of 36 audio files cannot be used \(2 missing\), the first .*03\.wav of 03"):
        prepare(settings, open_corpus(settings.corpus))
    settings = in_shards(settings, tmp_path / "train", on_bad="skip")
    prepared = prepare(settings, open_corpus(settings.corpus))
    assert len(prepared.corpus.utterances) == 34
    assert prepared.corpus.dropped == (DroppedRow("03", NO_AUDIO), DroppedRow("05", NO_AUDIO))


def test_an_utterance_that_was_cut_when_it_was_packed_is_refused(tmp_path):
    folder = write_tree(tmp_path / "audio", {"long.wav": noise(3.0, 1), "b.wav": noise(0.5, 2)})
    (folder / "manifest.csv").write_text("path,speaker,activation,valence,dominance\nlong.wav,s,3,3,3\nb.wav,t,2,2,2\n")
    pack(str(folder), str(tmp_path / "shards"), PackConfig(max_s=1.0))
    settings = in_shards(recipe(folder, "raw"), tmp_path / "shards")
    with pytest.raises(UserError, match=r"long lies in the shards at .* in pieces.*max_s=0"):
        prepare(settings, open_corpus(settings.corpus))


def test_a_folder_without_shards_and_a_system_that_packs_its_own_are_refused(tones, tmp_path):
    folder, shards = tones
    settings = in_shards(recipe(folder, "raw"), tmp_path)
    with pytest.raises(UserError, match=r"no shard set at .*cpcscale pack"):
        prepare(settings, open_corpus(settings.corpus))
    with pytest.raises(UserError, match=r"minicpc packs .* leave corpus\.shards out"):
        in_shards(recipe(folder, "minicpc"), shards)
