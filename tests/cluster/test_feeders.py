"""Promises of feeder actors: the bytes of the threads, whatever the members are, and a bounded number in flight."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speech
from trees import noise

from cpcscale.cluster.feeders import ActorFeed
from cpcscale.errors import UserError
from cpcscale.shards.adoption.adopt import adopt
from cpcscale.shards.adoption.read_tar import IndexConfig
from cpcscale.shards.index import Index
from cpcscale.storage import StorageConfig
from cpcscale.stream.batch import Batch
from cpcscale.stream.feed import Feed, FeedConfig, FeedSource, ThreadFeed
from cpcscale.stream.run_order import RunOrder
from cpcscale.stream.window import WindowConfig
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train.loop import pretrain
from cpcscale.train.ranks import Ranks
from cpcscale.train.setup import Data

FORMATS = [
    ("flac", "FLAC", "PCM_24", 16_000, 1),
    ("opus", "OGG", "OPUS", 16_000, 1),
    ("ogg", "OGG", "VORBIS", 44_100, 2),
    ("mp3", "MP3", "MPEG_LAYER_III", 22_050, 1),
    ("wav", "WAV", "FLOAT", 8_000, 1),
    ("wav", "WAV", "PCM_16", 16_000, 1),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars that nobody of ours wrote, of members in every format, with an index beside them."""
    folder = tmp_path_factory.mktemp("mixed")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number, (suffix, form, subtype, rate_hz, channels) in enumerate(FORMATS * 2):
                wave = np.repeat(noise(1.0 + number / 10, seed=10 * shard + number)[:, None], channels, axis=1)
                out = io.BytesIO()
                soundfile.write(out, wave, rate_hz, format=form, subtype=subtype)
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = out.tell()
                out.seek(0)
                tar.addfile(member, out)
    adopt(str(folder), IndexConfig())
    return folder


def taken(feed: Feed, steps: int) -> list[Batch]:
    try:
        return [feed.next() for _ in range(steps)]
    finally:
        feed.close()


@pytest.mark.parametrize("actors", [1, 3])
@pytest.mark.parametrize("kind", ["tile", "crop"])
def test_actors_give_the_bytes_of_threads_opus_and_24_bit_sources_included(mixed, ray_here, kind, actors):
    index, spec = Index.load(str(mixed)), WindowConfig(kind=kind, seconds=0.5)
    order = RunOrder(shard_windows(index, spec), 0, 4, 8)
    measures = speech.recipe(objective__acoustic__frames=1).measures
    source = FeedSource(index, order, spec, FeedConfig(actors=actors), measures)
    steps = order.lanes.steps_per_epoch + 2
    threads = taken(ThreadFeed(source, range(4), 0, threads=2), steps)
    fed = taken(ActorFeed(source, range(4), 0, StorageConfig()), steps)
    for one, other in zip(fed, threads, strict=True):
        assert (one.step, one.epoch, one.bad) == (other.step, other.epoch, other.bad)
        names = ("wave_BS", "samples_B", "key_B", "group_B", "utterance_B", "number_B", "frame_BTF", "window_BF")
        for name in names:
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
        assert one.wave_BS.flags.writeable


def test_an_adopted_set_of_every_format_trains_without_being_written_again(mixed, tmp_path):
    before = {path.name: path.read_bytes() for path in mixed.glob("*.tar")}
    recipe = speech.recipe(train__batch=4, train__lanes=2, train__steps=6)
    data = Data(Index.load(str(mixed)), {})
    summary = pretrain(recipe, data, str(tmp_path / "run"), Ranks.current(), speech.Watcher())
    assert summary["steps"] == 6
    assert summary["bad_windows"] == 0
    assert summary["audio_s"] > 6
    assert {path.name: path.read_bytes() for path in mixed.glob("*.tar")} == before


class Unreadable:
    """An argument that no actor can take, so that it dies as it is made."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)


def test_a_feeder_that_never_lives_is_one_line_after_a_few_times(mixed, ray_here):
    index, spec = Index.load(str(mixed)), WindowConfig(kind="tile", seconds=0.5)
    order = RunOrder(shard_windows(index, spec), 0, 4, 8)
    feed = ActorFeed(FeedSource(index, order, spec, FeedConfig()), [0], 0, Unreadable())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a feeder died 6 times without making a batch") as caught:
        feed.next()
    assert "\n" not in str(caught.value)
