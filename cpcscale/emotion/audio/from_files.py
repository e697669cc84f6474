"""The audio files of a corpus to int16 arrays in the cache, by the sha256 of each file's bytes, and what is wrong.

Audio in shards stays there, and its digests name its place.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import soundfile
import soxr
import torch

from cpcscale import audio, storage
from cpcscale.emotion.audio.array_cache import ArrayCache, ArrayWriter, CachedArrays, kind
from cpcscale.emotion.audio.from_shards import ShardedAudio, ShardPlace, locate, open_index, open_sharded
from cpcscale.emotion.audio.prefetch import flat_windows
from cpcscale.emotion.corpora.corpus import NO_AUDIO, Corpus, DroppedRow, Utterance
from cpcscale.errors import UserError
from cpcscale.progress import Progress

LEAST_S = 0.1
# The words by which `Corpus.dropped` counts.
_WORDS = {
    "missing": NO_AUDIO,
    "empty": "empty audio file",
    "unreadable": "audio that does not decode",
    "short": f"under {LEAST_S} s",
}
# Raise it when the same file gives other samples. Both libraries may change one from one version to the next, too.
VERSION = 1
DECODED = kind("waves", f"{VERSION}", f"libsndfile {soundfile.__libsndfile_version__}", f"soxr {soxr.__version__}")
# A request to a store is mostly waiting.
_STORE_THREADS = 16
_AHEAD = 64
# A file may change once more without a sign: some file systems tell times apart to 2 s only.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class UnusableAudio:
    """An utterance that cannot be used; `cause` is missing, empty, unreadable or short, `why` says more."""

    key: str
    path: str
    cause: str
    why: str

    @property
    def dropped(self) -> DroppedRow:
        """The row that `Corpus.dropped` gains."""
        return DroppedRow(self.key, _WORDS[self.cause])


@dataclass(frozen=True)
class ReadCorpus:
    """The audio of a corpus: `held` has the waveform of each by its digest, but for the rows in `bad`."""

    held: CachedArrays | ShardedAudio
    digests: list[str]
    bad: dict[int, UnusableAudio]


def read_corpus(corpus: Corpus, cache: ArrayCache) -> ReadCorpus:
    """Reads and decodes the files whose waveforms the cache does not have; a file that it knows is not opened.

    A file is known by its path, size and times of change, or its etag in a store. A corpus in shards is found in their
    index, and nothing of it is read yet. Raises UserError when a store or the cache fails.
    """
    if corpus.shards:
        return _read_shards(corpus, cache)
    paths = [one.path for one in corpus.utterances]
    local = all(storage.local_path(path) is not None for path in paths)
    with ThreadPoolExecutor(max(2, torch.get_num_threads()) if local else _STORE_THREADS) as pool:
        stamps = list(flat_windows(pool, _stamp, corpus.utterances, _AHEAD))
        bad = {row: stamp for row, stamp in enumerate(stamps) if isinstance(stamp, UnusableAudio)}
        held, digests = cache.held(DECODED), _known(cache, corpus, stamps)
        if _unread(held, digests, bad):
            with cache.filling(DECODED) as filler:
                # Anew: this process may have waited for one that read the same files.
                digests = _known(cache, corpus, stamps)
                _read_rows(pool, corpus, _unread(filler.held, digests, bad), filler, digests, bad)
                _remember(cache, corpus, stamps, digests)
            held = filler.held
    return ReadCorpus(held, digests, dict(sorted(bad.items())))


def read_file(
    utterance: Utterance, held: Collection[str] | CachedArrays = ()
) -> tuple[str, np.ndarray | UnusableAudio | None]:
    """(sha256 of the file, what is in it as int16 [S] or what is wrong); None for the waveform when `held` has it."""
    try:
        data = storage.read(utterance.path)
    except storage.NotFoundError as error:
        return "", UnusableAudio(utterance.key, utterance.path, "missing", str(error))
    digest = sha256(data).hexdigest()
    if digest in held:
        return digest, None
    if not data:
        return digest, UnusableAudio(utterance.key, utterance.path, "empty", "the file has 0 bytes")
    try:
        wave = audio.to_int16(audio.decode(data))
    except audio.AudioError as error:
        return digest, UnusableAudio(utterance.key, utterance.path, error.cause, str(error))
    if len(wave) < LEAST_S * audio.RATE_HZ:
        return digest, _short(utterance, len(wave))
    return digest, wave


def refusal(corpus: Corpus, bad: Sequence[UnusableAudio], way_out: str) -> UserError:
    """One line for all files that cannot be used: how many, of which cause, and the first."""
    causes = ", ".join(f"{count} {cause}" for cause, count in Counter(one.cause for one in bad).items())
    return UserError(
        f"corpus {corpus.name}: {len(bad)} of {len(corpus.utterances)} audio files cannot be used ({causes}), the "
        f"first {bad[0].path} of {bad[0].key}: {bad[0].why}; {way_out}"
    )


def _read_shards(corpus: Corpus, cache: ArrayCache) -> ReadCorpus:
    index = open_index(corpus.shards)
    bad, located = dict[int, UnusableAudio](), dict[int, ShardPlace]()
    for row, (one, place) in enumerate(zip(corpus.utterances, locate(index, corpus.utterances), strict=True)):
        if place is None:
            why = f"no utterance of this name is in the shards at {index.base}"
            bad[row] = UnusableAudio(one.key, one.path, "missing", why)
        elif place.samples < LEAST_S * audio.RATE_HZ:
            bad[row] = _short(one, place.samples)
        else:
            located[row] = place
    held, found = open_sharded(index, list(located.values()), cache.settings)
    digests = dict(zip(located, found, strict=True))
    return ReadCorpus(held, [digests.get(row, "") for row in range(len(corpus.utterances))], bad)


def _short(utterance: Utterance, samples: int) -> UnusableAudio:
    why = f"it lasts {samples / audio.RATE_HZ:.3f} s, too short for speech (at least {LEAST_S} s)"
    return UnusableAudio(utterance.key, utterance.path, "short", why)


def _unread(held: CachedArrays, digests: Sequence[str], bad: dict[int, UnusableAudio]) -> list[int]:
    return [row for row, digest in enumerate(digests) if row not in bad and digest not in held]


def _read_rows(
    pool: ThreadPoolExecutor,
    corpus: Corpus,
    rows: Sequence[int],
    filler: ArrayWriter,
    digests: list[str],
    bad: dict[int, UnusableAudio],
) -> None:
    """Reads these rows, and sets their digests and what is wrong with them."""
    read = flat_windows(pool, lambda row: read_file(corpus.utterances[row], filler.held), rows, _AHEAD)
    with Progress(f"reading {corpus.name}", len(rows), "utterances") as progress:
        for done, (row, (digest, found)) in enumerate(zip(rows, read, strict=True), start=1):
            digests[row] = digest
            if isinstance(found, UnusableAudio):
                bad[row] = found
            elif found is not None:
                filler.add(digest, found)
            progress.update(done)


def _stamp(utterance: Utterance) -> str | UnusableAudio:
    """What changes when the file does; empty when it changed so lately that it may without a sign."""
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
    """The digest of each file as far as it was read before and has the same stamp, else an empty string."""
    table = cache.table(corpus.name)
    rows = [table.get(one.path, ["", ""]) for one in corpus.utterances]
    return [row[1] if stamp and row[0] == stamp else "" for row, stamp in zip(rows, stamps, strict=True)]


def _remember(cache: ArrayCache, corpus: Corpus, stamps: Sequence[str | UnusableAudio], digests: Sequence[str]) -> None:
    rows = zip(corpus.utterances, stamps, digests, strict=True)
    told = {one.path: [stamp, digest] for one, stamp, digest in rows if isinstance(stamp, str) and stamp and digest}
    cache.keep_table(corpus.name, cache.table(corpus.name) | told)
