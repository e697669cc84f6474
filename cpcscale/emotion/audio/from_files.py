"""Decodes the audio files of a corpus into the cache, as int16 by the digest of each utterance; lists unusable files.

Audio in shards is not copied; its digests name its place in them.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import soundfile
import soxr
import torch

from cpcscale import storage
from cpcscale.emotion.audio.array_cache import ArrayCache, ArrayWriter, CachedArrays, cache_kind
from cpcscale.emotion.audio.from_shards import ShardedAudio, ShardPlace, locate, open_index, open_sharded
from cpcscale.emotion.audio.labelled_file import UnusableAudio, part_bounds, read_parts
from cpcscale.emotion.audio.prefetch import bounded_map
from cpcscale.emotion.corpora.corpus import Corpus, Utterance
from cpcscale.errors import UserError
from cpcscale.progress import Progress

# Raise it when the same file gives other samples, or is refused. New versions of either library may change them too.
VERSION = 3
DECODED_KIND = cache_kind(
    "waves", f"{VERSION}", f"libsndfile {soundfile.__libsndfile_version__}", f"soxr {soxr.__version__}"
)
# A request to an object store is mostly waiting.
_STORE_THREADS = 16
_AHEAD = 64
# Some file systems have times in steps of 2 s: a second change within them would not show.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class ReadCorpus:
    """The audio of a corpus: `source` has the waveform of each utterance by its digest, except those in `bad`."""

    source: CachedArrays | ShardedAudio
    digests: list[str]
    bad: dict[int, UnusableAudio]


def read_corpus(corpus: Corpus, cache: ArrayCache) -> ReadCorpus:
    """Decodes the files that the cache does not have; a cached file is not opened.

    A cached file is recognised by its path, size and times of change, or by its etag in an object store. For a corpus
    in shards, only their index is read. Raises UserError when a store or the cache fails.
    """
    if corpus.shards:
        return _read_shards(corpus, cache)
    paths = [one.path for one in corpus.utterances]
    local = all(storage.local_path(path) is not None for path in paths)
    with ThreadPoolExecutor(max(2, torch.get_num_threads()) if local else _STORE_THREADS) as pool:
        stamps = list(bounded_map(pool, _stamp, corpus.utterances, _AHEAD))
        bad = {row: stamp for row, stamp in enumerate(stamps) if isinstance(stamp, UnusableAudio)}
        cached, digests = cache.arrays(DECODED_KIND), _known(cache, corpus, stamps)
        if _unread(cached, digests, bad):
            with cache.writer(DECODED_KIND) as writer:
                # Looked up again: this process may have waited for another that read the same files.
                digests = _known(cache, corpus, stamps)
                _read_rows(pool, corpus, _unread(writer.arrays, digests, bad), writer, digests, bad)
                _remember(cache, corpus, stamps, digests)
            cached = writer.arrays
    return ReadCorpus(cached, digests, dict(sorted(bad.items())))


def unusable_audio_error(corpus: Corpus, bad: Sequence[UnusableAudio], way_out: str) -> UserError:
    """The error for all unusable files in one line: how many by cause, the first of them, and `way_out`."""
    causes = ", ".join(f"{count} {cause}" for cause, count in Counter(one.cause for one in bad).items())
    return UserError(
        f"corpus {corpus.name}: {len(bad)} of {len(corpus.utterances)} audio files cannot be used ({causes}), the "
        f"first {bad[0].path} of {bad[0].key}: {bad[0].why.rstrip('.')}; {way_out}"
    )


def _read_shards(corpus: Corpus, cache: ArrayCache) -> ReadCorpus:
    index = open_index(corpus.shards)
    bad, located = dict[int, UnusableAudio](), dict[int, ShardPlace]()
    for row, (one, place) in enumerate(zip(corpus.utterances, locate(index, corpus.utterances), strict=True)):
        if place is None:
            why = f"no utterance of this name is in the shards at {index.base}"
            bad[row] = UnusableAudio(one.key, one.path, "missing", why)
        elif isinstance(bounds := part_bounds(one, place.samples), UnusableAudio):
            bad[row] = bounds
        else:
            located[row] = place._replace(start=bounds[0], samples=bounds[1] - bounds[0])
    source, found = open_sharded(index, list(located.values()), cache.settings)
    digests = dict(zip(located, found, strict=True))
    return ReadCorpus(source, [digests.get(row, "") for row in range(len(corpus.utterances))], bad)


def _unread(cached: CachedArrays, digests: Sequence[str], bad: dict[int, UnusableAudio]) -> list[int]:
    return [row for row, digest in enumerate(digests) if row not in bad and digest not in cached]


def _read_rows(
    pool: ThreadPoolExecutor,
    corpus: Corpus,
    rows: Sequence[int],
    writer: ArrayWriter,
    digests: list[str],
    bad: dict[int, UnusableAudio],
) -> None:
    """Reads these rows into `writer`, and sets their entries in `digests` and `bad`."""
    files = (list(same) for _, same in itertools.groupby(rows, lambda row: corpus.utterances[row].path))
    found_in = bounded_map(
        pool, lambda same: read_parts([corpus.utterances[row] for row in same], writer.arrays), files, _AHEAD
    )
    read = itertools.chain.from_iterable(found_in)
    with Progress(f"reading {corpus.name}", len(rows), "utterances") as progress:
        for done, (row, (digest, found)) in enumerate(zip(rows, read, strict=True), start=1):
            digests[row] = digest
            if isinstance(found, UnusableAudio):
                bad[row] = found
            elif found is not None:
                writer.add(digest, found)
            progress.update(done)


def _stamp(utterance: Utterance) -> str | UnusableAudio:
    """A text that changes whenever the file does; "" if it changed so lately that another change might not show."""
    try:
        size, etag = storage.stat(utterance.path)
    except storage.NotFoundError as error:
        return UnusableAudio(utterance.key, utterance.path, "missing", str(error))
    local = storage.local_path(utterance.path)
    if local is None:
        return f"{size} {etag}"
    state = local.stat()
    settled = time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) > _SETTLED_NS
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}" if settled else ""


def _known(cache: ArrayCache, corpus: Corpus, stamps: Sequence[str | UnusableAudio]) -> list[str]:
    """The digest of each file that was read before and has the same stamp, else ""."""
    table = cache.load_table(corpus.name)
    rows = [table.get(_place(one), ["", ""]) for one in corpus.utterances]
    return [row[1] if stamp and row[0] == stamp else "" for row, stamp in zip(rows, stamps, strict=True)]


def _remember(cache: ArrayCache, corpus: Corpus, stamps: Sequence[str | UnusableAudio], digests: Sequence[str]) -> None:
    rows = zip(corpus.utterances, stamps, digests, strict=True)
    known = {_place(one): [stamp, digest] for one, stamp, digest in rows if isinstance(stamp, str) and stamp and digest}
    cache.save_table(corpus.name, cache.load_table(corpus.name) | known)


def _place(utterance: Utterance) -> str:
    return f"{utterance.path} {utterance.segment}" if utterance.segment else utterance.path
