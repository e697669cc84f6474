"""The audio of a labelled corpus as int16 windows at 16 kHz, decoded once, and features of them, computed once.

An utterance of up to `max_s` seconds is one window. A longer one is overlapping windows of `max_s`, each half a window
after the one before and the last ending with the utterance. What is said of it is the mean of what is said of its
windows, weighted by `shares`: each moment of the utterance counts the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

import numpy as np

from cpcscale import audio
from cpcscale.emotion.audio.array_cache import ArrayCache, ArrayWriter, AudioCacheConfig, CachedArrays, kind
from cpcscale.emotion.audio.from_files import DECODED, UnusableAudio, read_corpus, read_file, refusal
from cpcscale.emotion.audio.from_shards import ShardedAudio
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


def spans(samples: int, most: int) -> list[tuple[int, int]]:
    """[start, stop) of the windows of `samples`, each of `most` unless there are fewer; every sample is in one."""
    if samples <= most:
        return [(0, samples)]
    return [(start, start + most) for start in (*range(0, samples - most, max(1, most // 2)), samples - most)]


def shares(windows: Sequence[tuple[int, int]]) -> np.ndarray:
    """float64 [W], adding up to 1: the part of the utterance that each of its windows stands for.

    A moment that several windows hold is divided among them evenly. So the mean of the windows' scores by these weights
    is the mean over time, in which no moment counts twice for being heard twice.
    """
    starts_W, stops_W = np.array(windows).T
    edges = np.unique(np.concatenate([starts_W, stops_W]))
    samples_W = np.zeros(len(windows))
    for start, stop in itertools.pairwise(edges):
        holding_W = (starts_W <= start) & (stop <= stops_W)
        samples_W[holding_W] += (stop - start) / holding_W.sum()
    return samples_W / samples_W.sum()


class Waves(Sequence[Windows]):
    """The windows of each utterance, int16 [S], in the corpus's order: views of what the cache has mapped, so
    read-only, or decoded from shards when they are asked for. None of them is held here.

    `corpus` has the utterances that can be used, `bad` the others, `digests` the sha256 of each file, or of its place
    in a shard. Pickled, it is opened again where it arrives: from the cache of that node, or from the audio, which must
    be the same.
    """

    def __init__(
        self,
        corpus: Corpus,
        held: CachedArrays | ShardedAudio,
        digests: Sequence[str],
        *,
        cache: ArrayCache,
        max_s: float,
        least_samples: int = 0,
        bad: tuple[UnusableAudio, ...] = (),
    ) -> None:
        """`held` has the whole utterances by `digests`; `open` makes this."""
        self.corpus, self.digests, self.bad, self.cache = corpus, tuple(digests), bad, cache
        self.max_s, self.least_samples = max_s, least_samples
        self._held = held

    @classmethod
    def open(cls, corpus: Corpus, settings: AudioCacheConfig, *, max_s: float = 10.0, on_bad: str = "stop") -> Waves:
        """Reads and decodes what the cache does not have; of a corpus in shards, the index alone.

        Raises UserError when the store or the cache fails, and, once all files were tried, for any that is missing,
        empty, not decodable or under 0.1 s, unless `on_bad` is skip and an utterance is left.
        """
        cache = ArrayCache(settings)
        read = read_corpus(corpus, cache)
        bad = tuple(read.bad.values())
        if len(bad) == len(read.digests):
            raise refusal(corpus, bad, "no utterance is left: check corpus.path")
        if bad and on_bad != "skip":
            raise refusal(corpus, bad, "mend them or drop their rows, or pass corpus.on_bad=skip to go on without them")
        for one in bad:
            log.warning("%s: left out %s, %s: %s", corpus.name, one.key, one.path, one.why)
        rows = [row for row in range(len(read.digests)) if row not in read.bad]
        digests = [read.digests[row] for row in rows]
        if isinstance(read.held, CachedArrays):
            read.held.keep(digests)
        usable = dataclasses.replace(_only(corpus, rows), dropped=(*corpus.dropped, *(one.dropped for one in bad)))
        return cls(usable, read.held, digests, cache=cache, max_s=max_s, bad=bad)

    def at_least(self, samples: int) -> Waves:
        """The same, shorter windows repeating themselves to `samples`: an encoder's hop or receptive field."""
        return self._with(self.corpus, self.digests, max(self.least_samples, samples))

    def spanning(self, max_s: float) -> Waves:
        """The same, in windows of up to so many seconds."""
        return Waves(
            self.corpus,
            self._held,
            self.digests,
            cache=self.cache,
            max_s=max_s,
            least_samples=self.least_samples,
            bad=self.bad,
        )

    def take(self, rows: Iterable[int]) -> Waves:
        """These utterances only, in this order."""
        rows = list(rows)
        return self._with(_only(self.corpus, rows), [self.digests[row] for row in rows], self.least_samples)

    def samples(self, row: int) -> int:
        """The length of the whole utterance; nothing of it is read."""
        return self._held.shape(self.digests[row])[0]

    def spans(self, row: int) -> list[tuple[int, int]]:
        """[start, stop) in the utterance of each of its windows."""
        return spans(self.samples(row), round(self.max_s * audio.RATE_HZ))

    def shares(self, row: int) -> np.ndarray:
        """The weight of each window in what is said of the utterance, float64 [W]: see `shares`."""
        return shares(self.spans(row))

    def whole(self, row: int) -> np.ndarray:
        """The whole utterance, int16 [S]. Raises UserError when the cache lost it and its file has changed since."""
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
            self._held,
            digests,
            cache=self.cache,
            max_s=self.max_s,
            least_samples=least_samples,
            bad=self.bad,
        )

    def _part(self, row: int, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) of an utterance."""
        if isinstance(self._held, ShardedAudio):
            return self._held.read(self.digests[row], start, stop)
        return self._held.read(self.digests[row], lambda: self._decoded(row))[start:stop]

    def _long_enough(self, wave: np.ndarray) -> np.ndarray:
        return wave if len(wave) >= self.least_samples else np.resize(wave, self.least_samples)

    def _decoded(self, row: int) -> np.ndarray:
        utterance = self.corpus.utterances[row]
        digest, wave = read_file(utterance)
        if digest != self.digests[row] or not isinstance(wave, np.ndarray):
            raise _changed(self.corpus, utterance)
        return wave


class Features(Sequence[Windows]):
    """One array a window of each utterance of `waves`, mapped from the cache, so read-only; `features` makes it.

    Pickled, it is made again where it arrives, from the cache of that node where it has it.
    """

    def __init__(self, name: str, digest: str, waves: Waves, compute: Compute, held: CachedArrays) -> None:
        self.waves = waves
        self._name, self._digest, self._compute, self._held = name, digest, compute, held

    def window(self, row: int, number: int) -> np.ndarray:
        """The array of one window."""
        return self._held.read(
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

    def __reduce__(self) -> tuple[Callable[..., Features], tuple[object, ...]]:
        return features, (self._name, self._digest, self.waves, self._compute)


def features(name: str, digest: str, waves: Waves, compute: Compute) -> Features:
    """What `compute` makes of each window, of which only what the cache does not have is computed.

    `name` is for people; `digest` stands for all that decides what `compute` returns: its settings and its weights.
    `compute` takes int16 windows of like length, up to a minute together when padded, and returns one array for each.
    """
    what = kind(name, digest, DECODED)
    places = {
        _key(waves, row, number): (row, number) for row in range(len(waves)) for number in range(len(waves.spans(row)))
    }
    held = waves.cache.held(what)
    if any(key not in held for key in places):
        with waves.cache.filling(what) as filler:
            # Anew: this process may have waited for one that computed the same.
            missing = {key: place for key, place in places.items() if key not in filler.held}
            _compute_missing(name, waves, compute, missing, filler)
        held = filler.held
    held.keep(places)
    return Features(name, digest, waves, compute, held)


def _compute_missing(
    name: str, waves: Waves, compute: Compute, missing: Mapping[str, tuple[int, int]], filler: ArrayWriter
) -> None:
    most, utterances = round(waves.max_s * audio.RATE_HZ), waves.corpus.utterances
    lengths = {key: min(waves.samples(row), most) for key, (row, _) in missing.items()}

    def place(key: str) -> tuple[int, str, int]:
        # By name, so that who shares a batch, and with it the last bits, does not follow from where the audio lies.
        row, number = missing[key]
        return lengths[key], utterances[row].key, number

    done = 0
    with Progress(f"computing {name}", len(missing), "windows") as progress:
        heard = read_ahead(
            lambda keys: (keys, [waves.window(*missing[key]) for key in keys]),
            _batches({key: lengths[key] for key in sorted(missing, key=place)}, waves.least_samples),
            _BATCHES_AHEAD,
        )
        for keys, windows in heard:
            arrays = compute(windows)
            for key, array in zip(keys, arrays, strict=True):
                filler.add(key, array)
            done += len(keys)
            progress.update(done)


def _batches(lengths: Mapping[str, int], least: int) -> Iterator[list[str]]:
    """The keys in their order, the shortest first, in groups of at most a minute when padded, or of one key."""
    group: list[str] = []
    for key in lengths:
        if group and max(lengths[key], least) * (len(group) + 1) > _BATCH_SAMPLES:
            yield group
            group = []
        group.append(key)
    if group:
        yield group


def _key(waves: Waves, row: int, number: int) -> str:
    """All that a window is: so max_s may change, and what was one window stays known."""
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
