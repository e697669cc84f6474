"""The audio of a labelled corpus as int16 windows at 16 kHz, decoded once, and their features, computed once.

An utterance of up to `max_s` seconds is one window. A longer one is cut into overlapping windows of `max_s`: each
starts half a window after the one before, and the last ends with the utterance. The prediction for an utterance is the
mean over its windows, weighted by `window_shares`, so that each moment of the utterance counts the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np

from cpcscale import audio
from cpcscale.emotion.audio.array_cache import ArrayCache, ArrayWriter, AudioCacheConfig, CachedArrays, cache_kind
from cpcscale.emotion.audio.from_files import DECODED_KIND, read_corpus, unusable_audio_error
from cpcscale.emotion.audio.from_shards import ShardedAudio
from cpcscale.emotion.audio.labelled_file import UnusableAudio, read_file
from cpcscale.emotion.audio.prefetch import read_ahead
from cpcscale.emotion.corpora.corpus import Corpus, Utterance
from cpcscale.errors import UserError
from cpcscale.progress import Progress

log = logging.getLogger(__name__)

_BATCH_SAMPLES = 60 * audio.RATE_HZ
_BATCHES_AHEAD = 4

Windows = tuple[np.ndarray, ...]
# int16 windows [S] to one array each, such as float32 features [T, C].
Compute = Callable[[list[np.ndarray]], Sequence[np.ndarray]]


def window_spans(samples: int, most: int) -> list[tuple[int, int]]:
    """[start, stop) of the windows of an utterance of `samples`, each of `most` samples, or one shorter window."""
    if samples <= most:
        return [(0, samples)]
    return [(start, start + most) for start in (*range(0, samples - most, max(1, most // 2)), samples - most)]


def window_shares(windows: Sequence[tuple[int, int]]) -> np.ndarray:
    """The weight of each window of an utterance, float64 [W] with sum 1, from the windows' [start, stop).

    A moment in several windows is divided among them evenly. So the weighted mean of the windows' predictions is a mean
    over time, in which overlaps do not count twice.

    >>> window_spans(30, 20)
    [(0, 20), (10, 30)]
    >>> window_shares([(0, 20), (10, 30)])
    array([0.5, 0.5])
    """
    starts_W, stops_W = np.array(windows).T
    edges = np.unique(np.concatenate([starts_W, stops_W]))
    samples_W = np.zeros(len(windows))
    for start, stop in itertools.pairwise(edges):
        holding_W = (starts_W <= start) & (stop <= stops_W)
        samples_W[holding_W] += (stop - start) / holding_W.sum()
    return samples_W / samples_W.sum()


class Waves(Sequence[Windows]):
    """The windows of each utterance, int16 [S], in the order of `corpus`; `waves[row]` is a tuple of them.

    They are read-only views of the memory-mapped cache, or decoded from shards on access; none is kept in memory here.
    `corpus` has the usable utterances, `bad` the others; `digests` are the sha256 of each file, or of its place in a
    shard. An unpickled copy opens the cache of its own node, or the audio, which must be the same.
    """

    def __init__(
        self,
        corpus: Corpus,
        source: CachedArrays | ShardedAudio,
        digests: Sequence[str],
        *,
        cache: ArrayCache,
        max_s: float,
        least_samples: int = 0,
        bad: tuple[UnusableAudio, ...] = (),
    ) -> None:
        """Use `open`. `source` has the whole utterances by their `digests`."""
        self.corpus, self.digests, self.bad, self.cache = corpus, tuple(digests), bad, cache
        self.max_s, self.least_samples = max_s, least_samples
        self._source = source

    @classmethod
    def open(cls, corpus: Corpus, settings: AudioCacheConfig, *, max_s: float = 10.0, on_bad: str = "stop") -> Waves:
        """Opens the audio of a corpus: decodes the files that the cache does not have; of shards, reads the index.

        Raises UserError when the store or the cache fails and, after trying all files, if any is missing, empty, not
        decodable or under 0.1 s. With `on_bad="skip"` these are left out; it raises only if no utterance is left.
        """
        cache = ArrayCache(settings)
        read = read_corpus(corpus, cache)
        bad = tuple(read.bad.values())
        if len(bad) == len(read.digests):
            raise unusable_audio_error(corpus, bad, "no utterance is left: check corpus.path")
        if bad and on_bad != "skip":
            raise unusable_audio_error(
                corpus, bad, "repair them, drop their rows, or pass corpus.on_bad=skip to go on without them"
            )
        for one in bad:
            log.warning("%s: left out %s, %s: %s", corpus.name, one.key, one.path, one.why)
        rows = [row for row in range(len(read.digests)) if row not in read.bad]
        digests = [read.digests[row] for row in rows]
        if isinstance(read.source, CachedArrays):
            read.source.keep_only(digests)
        usable = dataclasses.replace(_only(corpus, rows), dropped=(*corpus.dropped, *(one.dropped for one in bad)))
        return cls(usable, read.source, digests, cache=cache, max_s=max_s, bad=bad)

    def at_least(self, samples: int) -> Waves:
        """The same audio, with shorter windows repeated up to `samples`, such as an encoder's receptive field."""
        return self._with(self.corpus, self.digests, max(self.least_samples, samples))

    def with_max_s(self, max_s: float) -> Waves:
        """The same audio in windows of up to `max_s` seconds."""
        return Waves(
            self.corpus,
            self._source,
            self.digests,
            cache=self.cache,
            max_s=max_s,
            least_samples=self.least_samples,
            bad=self.bad,
        )

    def take(self, rows: Iterable[int]) -> Waves:
        """The same audio with these utterances only, in this order."""
        rows = list(rows)
        return self._with(_only(self.corpus, rows), [self.digests[row] for row in rows], self.least_samples)

    def samples(self, row: int) -> int:
        """The length of the whole utterance in samples; reads no audio."""
        return self._source.shape(self.digests[row])[0]

    def spans(self, row: int) -> list[tuple[int, int]]:
        """[start, stop) of each window in the utterance, in samples."""
        return window_spans(self.samples(row), round(self.max_s * audio.RATE_HZ))

    def shares(self, row: int) -> np.ndarray:
        """The weight of each window, float64 [W]: see `window_shares`."""
        return window_shares(self.spans(row))

    def whole(self, row: int) -> np.ndarray:
        """The whole utterance, int16 [S]. Raises UserError if the cache lost it and its file has changed."""
        return self._part(row, 0, self.samples(row))

    def window(self, row: int, number: int) -> np.ndarray:
        """One window of an utterance, int16 [S]."""
        return self._long_enough(self._part(row, *self.spans(row)[number]))

    def __len__(self) -> int:
        return len(self.digests)

    @overload
    def __getitem__(self, row: int) -> Windows: ...
    @overload
    def __getitem__(self, row: slice) -> Waves: ...
    def __getitem__(self, row: int | slice) -> Windows | Waves:
        if isinstance(row, slice):
            return self.take(range(len(self))[row])
        whole = self.whole(row)
        return tuple(self._long_enough(whole[start:stop]) for start, stop in self.spans(row))

    def __reduce__(self) -> tuple[Callable[..., Waves], tuple[object, ...]]:
        return _reopened, (self.corpus, self.digests, self.cache.settings, self.max_s, self.least_samples, self.bad)

    def _with(self, corpus: Corpus, digests: Sequence[str], least_samples: int) -> Waves:
        return Waves(
            corpus,
            self._source,
            digests,
            cache=self.cache,
            max_s=self.max_s,
            least_samples=least_samples,
            bad=self.bad,
        )

    def _part(self, row: int, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) of an utterance."""
        if isinstance(self._source, ShardedAudio):
            return self._source.read(self.digests[row], start, stop)
        return self._source.read(self.digests[row], lambda: self._decoded(row))[start:stop]

    def _long_enough(self, wave: np.ndarray) -> np.ndarray:
        return wave if len(wave) >= self.least_samples else np.resize(wave, self.least_samples)

    def _decoded(self, row: int) -> np.ndarray:
        utterance = self.corpus.utterances[row]
        digest, wave = read_file(utterance)
        if digest != self.digests[row] or not isinstance(wave, np.ndarray):
            raise _changed(self.corpus, utterance)
        return wave


class CachedFeatures(Sequence[Windows]):
    """The features of each utterance of `waves`: a tuple with one read-only array for each window.

    Made by `compute_features`; the arrays are memory-mapped. An unpickled copy uses the cache of its own node, and
    computes what that lacks.
    """

    def __init__(self, name: str, digest: str, waves: Waves, compute: Compute, cached: CachedArrays) -> None:
        self.waves = waves
        self._name, self._digest, self._compute, self._cached = name, digest, compute, cached

    def window(self, row: int, number: int) -> np.ndarray:
        """The array of one window."""
        return self._cached.read(
            _key(self.waves, row, number), lambda: self._compute([self.waves.window(row, number)])[0]
        )

    def __len__(self) -> int:
        return len(self.waves)

    @overload
    def __getitem__(self, row: int) -> Windows: ...
    @overload
    def __getitem__(self, row: slice) -> list[Windows]: ...
    def __getitem__(self, row: int | slice) -> Windows | list[Windows]:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        return tuple(self.window(row, number) for number in range(len(self.waves.spans(row))))

    def __reduce__(self) -> tuple[Callable[..., CachedFeatures], tuple[object, ...]]:
        return compute_features, (self._name, self._digest, self.waves, self._compute)


def compute_features(name: str, digest: str, waves: Waves, compute: Compute) -> CachedFeatures:
    """The features of each window; computes only those that the cache does not have.

    `name` is for people; `digest` must change whenever `compute` would return other values (its settings and weights).
    `compute` takes int16 windows of like length, up to a minute together when padded, and returns one array for each.
    """
    kind = cache_kind(name, digest, DECODED_KIND)
    places = {
        _key(waves, row, number): (row, number) for row in range(len(waves)) for number in range(len(waves.spans(row)))
    }
    cached = waves.cache.arrays(kind)
    if any(key not in cached for key in places):
        with waves.cache.writer(kind) as writer:
            # Looked up again: this process may have waited for another that computed the same.
            missing = {key: place for key, place in places.items() if key not in writer.arrays}
            _compute_missing(name, waves, compute, missing, writer)
        cached = writer.arrays
    cached.keep_only(places)
    return CachedFeatures(name, digest, waves, compute, cached)


def _compute_missing(
    name: str, waves: Waves, compute: Compute, missing: Mapping[str, tuple[int, int]], writer: ArrayWriter
) -> None:
    most, utterances = round(waves.max_s * audio.RATE_HZ), waves.corpus.utterances
    lengths = {key: min(waves.samples(row), most) for key, (row, _) in missing.items()}

    def place(key: str) -> tuple[int, str, int]:
        # Sorted by the key, not the path: which windows share a batch changes the last bits of the result.
        row, number = missing[key]
        return lengths[key], utterances[row].key, number

    done = 0
    with Progress(f"computing {name}", len(missing), "windows") as progress:
        read = read_ahead(
            lambda keys: (keys, [waves.window(*missing[key]) for key in keys]),
            _batches({key: lengths[key] for key in sorted(missing, key=place)}, waves.least_samples),
            _BATCHES_AHEAD,
        )
        for keys, windows in read:
            arrays = compute(windows)
            for key, array in zip(keys, arrays, strict=True):
                writer.add(key, array)
            done += len(keys)
            progress.update(done)


def _batches(lengths: Mapping[str, int], least: int) -> Iterator[list[str]]:
    """The keys in order, shortest window first, in groups of at most a minute when padded, or of one key."""
    group: list[str] = []
    for key in lengths:
        if group and max(lengths[key], least) * (len(group) + 1) > _BATCH_SAMPLES:
            yield group
            group = []
        group.append(key)
    if group:
        yield group


def _key(waves: Waves, row: int, number: int) -> str:
    """The cache key of a window: its samples alone, so that it stays valid when max_s changes."""
    start, stop = waves.spans(row)[number]
    return f"{waves.digests[row]}.{start}.{stop}.{max(stop - start, waves.least_samples)}"


def _only(corpus: Corpus, rows: Iterable[int]) -> Corpus:
    return dataclasses.replace(corpus, utterances=tuple(corpus.utterances[row] for row in rows))


def _reopened(
    corpus: Corpus,
    digests: tuple[str, ...],
    settings: AudioCacheConfig,
    max_s: float,
    least_samples: int,
    bad: tuple[UnusableAudio, ...],
) -> Waves:
    waves = Waves.open(corpus, settings, max_s=max_s).at_least(least_samples)
    for utterance, digest, now in zip(corpus.utterances, digests, waves.digests, strict=True):
        if digest != now:
            raise _changed(corpus, utterance)
    waves.bad = bad
    return waves


def _changed(corpus: Corpus, utterance: Utterance) -> UserError:
    return UserError(f"{utterance.path} in corpus {corpus.name} was changed since this run opened it: start again")
