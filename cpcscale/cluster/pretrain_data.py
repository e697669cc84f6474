"""Opens the shard sets of a pretraining; packs audio first if needed, and checks the data before workers start."""

from __future__ import annotations

from cpcscale import storage
from cpcscale.cluster.pretrain_config import PretrainConfig
from cpcscale.cluster.tasks import stream_tasks
from cpcscale.errors import UserError
from cpcscale.progress import note
from cpcscale.shards import cache
from cpcscale.shards.index import MARKER, Index
from cpcscale.shards.pack import HELDOUT, TRAIN, UNSEEN, pack_sources
from cpcscale.shards.packing.sources import AudioFiles, find_audio
from cpcscale.stream.window_counts import shard_windows
from cpcscale.train import resume
from cpcscale.train.checkpoint import RestoredCheckpoint
from cpcscale.train.setup import Data


def open_data(config: PretrainConfig) -> Data:
    """The training set and the held-out sets at data.shards. Raises UserError when there are none."""
    base = config.data.shards
    if storage.exists(storage.join(base, MARKER)):
        return Data(Index.load(base), {}, config.data.append)
    if not storage.exists(storage.join(base, TRAIN, MARKER)):
        raise UserError(
            f"no shard set at data.shards={storage.shown(base)}: make one with `cpcscale pack AUDIO "
            f"{storage.shown(base)}`, or set data.audio to the folder of audio to pack into it"
        )
    sets = {name: storage.join(base, name) for name in (HELDOUT, UNSEEN)}
    present = {name: Index.load(url) for name, url in sets.items() if storage.exists(storage.join(url, MARKER))}
    return Data(Index.load(storage.join(base, TRAIN)), present, config.data.append)


def audio_to_pack(config: PretrainConfig) -> AudioFiles | None:
    """The audio below `data.audio` where there is no shard set at `data.shards` yet, else None."""
    base = config.data.shards
    if not config.data.audio or any(storage.exists(storage.join(base, *at, MARKER)) for at in ((), (TRAIN,))):
        return None
    return find_audio(config.data.audio, config.data.pack)


def pack_audio(config: PretrainConfig, audio: AudioFiles) -> None:
    """Packs this audio into `data.shards`."""
    note(
        f"pretrain: no shard set at {storage.shown(config.data.shards)} yet, packing "
        f"{storage.shown(config.data.audio)} into it"
    )
    pack_sources(audio, config.data.shards, config.data.pack, stream_tasks)


def checked_data(config: PretrainConfig, restored: RestoredCheckpoint | None) -> Data:
    """The shard sets, after the checks that workers make: raises their UserError before any worker starts."""
    data = open_data(config)
    windows = shard_windows(data.train, config.window, config.feed.cache.path)
    resume.start(restored, config, data.train, windows, data.append)
    largest = int(max(data.train.shards["bytes"].to_numpy(), default=0))
    # Each worker checks again, for all the lanes of its node.
    cache.keeps_whole_shards(
        config.feed.cache, data.train.base, -(-config.train.lanes // config.least_workers), largest
    )
    return data
