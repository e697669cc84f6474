"""Damaged audio files against pack, index, describe, fine-tuning and predict."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import soundfile
from test_audio_files import FORMS, coded
from trees import noise

from cpcscale import audio
from cpcscale.emotion.audio.labelled_file import UnusableAudio, read_file
from cpcscale.emotion.corpora.corpus import Utterance
from cpcscale.emotion.fitted import FittedRecogniser, MeanHead
from cpcscale.errors import AudioError
from cpcscale.serve.folder import SavedRecogniser
from cpcscale.serve.recogniser import Recogniser
from cpcscale.shards.adoption.read_tar import measure_member
from cpcscale.shards.index import Index
from cpcscale.shards.pack import PackConfig, pack
from cpcscale.shards.reader import ShardReader
from fuzz.doors import Door, WrongSuccess, emptied

# Frames of MP3 that a decoder may leave out, in samples at 16 kHz, where a header does not count them.
_SLACK = 4 * 1152 * 2
_SLACK_S = _SLACK / 16_000
_MIN_S = 0.2
_SUFFIXES = {"float": "wav", "adpcm": "wav", "sphere": "sph", "alac": "caf", "vorbis": "ogg", "aiff": "aiff"}


def seeds() -> dict[str, bytes]:
    """A file of every form by name, some at other rates or with two channels."""
    found = {f"{form}.{_SUFFIXES.get(form, form)}": coded(form, 0.5) for form in FORMS}
    found["slow.wav"], found["slow.mp3"] = coded("wav", 0.5, rate_hz=8000), coded("mp3", 0.5, rate_hz=44_100)
    for form, suffix in (("WAV", "wav"), ("FLAC", "flac"), ("OGG", "ogg"), ("WAVEX", "wav")):
        out = io.BytesIO()
        subtype = {"OGG": "VORBIS", "WAVEX": "PCM_24"}.get(form, "PCM_16")
        soundfile.write(out, np.stack([noise(0.5, 3), noise(0.5, 4)], axis=1), 16_000, format=form, subtype=subtype)
        found[f"stereo_{form.lower()}.{suffix}"] = out.getvalue()
    return found


def doors(scratch: Path) -> list[Door]:
    """One door for reading whole files, one for packing them."""
    files = seeds()
    whole = {name: len(audio.decode(data)) for name, data in files.items()}
    reading = _Reading(emptied(scratch / "read"), whole)
    packing = _Packing(emptied(scratch / "pack"))
    return [
        Door("audio file", files, reading.enter, weight=4),
        Door("audio in pack", files, packing.enter, weight=2),
    ]


class _Reading:
    """All readers of a whole file, which must agree."""

    def __init__(self, folder: Path, whole: dict[str, int]) -> None:
        self._folder, self._whole = folder, whole
        constant = FittedRecogniser("mean", None, MeanHead(np.zeros(3)), 10.0, (1.0, 5.0))
        self._recogniser = Recogniser(SavedRecogniser(constant, {}))

    def enter(self, target: str, data: bytes, done: str) -> bool:
        path = self._folder / target
        path.write_bytes(data)
        with path.open("rb", buffering=0) as file:
            causes = {_cause(source) for source in (data, str(path), file)}
        if len(causes) > 1:
            raise WrongSuccess(f"the header by content, path and open file: {causes}")
        try:
            info, wave = audio.decode_checked(data)
            samples, _ = audio.check_sound(wave, audio.SoundLimits())
        except AudioError as error:
            self._refused_by_all(path, data, error.cause)
            self._predicted(path, error.cause, 0)
            raise
        self._predicted(path, "", len(samples))
        self._check(target, data, info, wave, done)
        used = read_file(Utterance("a", str(path), "", (0, 0, 0)))[1]
        if isinstance(used, UnusableAudio):
            if used.cause != "short":
                raise WrongSuccess(f"fine-tuning refuses what describe takes: {used.why}")
        elif not np.array_equal(used, samples):
            raise WrongSuccess("fine-tuning has other samples than describe")
        self._indexed(data, samples)
        return True

    def _check(self, target: str, data: bytes, info: audio.AudioInfo, wave: np.ndarray, done: str) -> None:
        if abs(len(wave) - info.length) > audio.slack_samples(info):
            raise WrongSuccess(f"the header says {info.length} samples and {len(wave)} decode")
        blocks = np.concatenate(list(audio.decode_blocks(data)))
        if len(blocks) != len(wave) or not np.allclose(blocks, wave, atol=1e-3):
            raise WrongSuccess(f"{len(blocks)} samples in blocks, {len(wave)} as a whole")
        if done == "none" and len(wave) != self._whole.get(target, len(wave)):
            raise WrongSuccess(f"{len(wave)} of {self._whole[target]} samples of a whole file")
        ogg_at_page = data.startswith(b"OggS") and target in self._whole
        if done == "cut" and len(wave) < self._whole.get(target, 0) - 2 and not ogg_at_page:
            raise WrongSuccess(f"a file cut to {len(wave)} of {self._whole[target]} samples is taken for whole")
        if done == "doubled" and len(wave) < 2 * self._whole.get(target, 0) - _SLACK:
            raise WrongSuccess(f"{len(wave)} samples of two files of {self._whole[target]} each")

    def _indexed(self, data: bytes, samples: np.ndarray) -> None:
        try:
            row = measure_member(data, _MIN_S, decode=True)
        except AudioError as error:
            # The index alone tries slices.
            if error.cause not in ("short", "seeks"):
                raise WrongSuccess(f"the index refuses what describe takes: {error}") from None
            return
        if row["samples"] != len(samples):
            raise WrongSuccess(f"the index has {row['samples']} samples, describe {len(samples)}")
        part = audio.decode_slice(data, len(samples) // 3, len(samples) // 3)
        expected = samples[len(samples) // 3 :][: len(part)]
        if np.abs(part.astype(float) - expected).mean() > 2000:
            raise WrongSuccess("training decodes other samples than describe")

    def _predicted(self, path: Path, cause: str, samples: int) -> None:
        [one] = self._recogniser.rows(str(path))
        if np.isnan(one.unit).any() == (one.reason == ""):
            raise WrongSuccess(f"predict says {one.unit} for the reason {one.reason!r}")
        # It judges by the level and by voices, too, and lets clipped audio and offsets pass with a flag.
        if cause not in ("", "clipped", "constant", "quiet", "silent") and not one.reason:
            raise WrongSuccess(f"describe refuses it ({cause}) and predict does not")
        if samples and round(one.seconds * audio.RATE_HZ) != samples:
            raise WrongSuccess(f"predict takes {one.seconds} s of {samples} samples")

    def _refused_by_all(self, path: Path, data: bytes, cause: str) -> None:
        used = read_file(Utterance("a", str(path), "", (0, 0, 0)))[1]
        if not isinstance(used, UnusableAudio) or used.cause not in (cause, "short"):
            raise WrongSuccess(f"describe refuses it ({cause}) and fine-tuning does not")
        try:
            measure_member(data, _MIN_S, decode=True)
        except AudioError as error:
            if error.cause not in (cause, "short"):
                raise WrongSuccess(f"describe says {cause}, index {error.cause}") from None
        else:
            raise WrongSuccess(f"describe refuses it ({cause}) and index does not")


def _cause(source: audio.Source) -> str:
    try:
        return f"{audio.read_header(source)}"
    except AudioError as error:
        return error.cause


class _Packing:
    """`pack` of a damaged file beside a good one."""

    def __init__(self, folder: Path) -> None:
        self._source, self._target = folder / "in", folder / "out"
        self._good = audio.encode(noise(0.5, 9), "wav")

    def enter(self, target: str, data: bytes, done: str) -> bool:
        emptied(self._source)
        emptied(self._target)
        (self._source / target).write_bytes(data)
        (self._source / "z_good.wav").write_bytes(self._good)
        packed = pack(str(self._source), str(self._target), PackConfig(codec="wav", max_s=1.0))
        account, index = packed.account, packed.splits["train"]
        if account.found[0] != 2 or abs(account.found[1] - account.taken[1] - account.left_out_s) > _SLACK_S:
            raise WrongSuccess(f"the account does not add up: {account.values()}")
        rows = index.utterances.to_pylist()
        taken = [row for row in rows if row["recording"] == target]
        if len(rows) == len(taken):
            raise WrongSuccess("the good file beside it is not packed")
        if not taken and not packed.quarantine:
            raise WrongSuccess("it is neither packed nor in quarantine")
        _read_back(index)
        whole = not packed.quarantine
        if whole:
            there = sum(row["samples"] for row in taken)
            info, wave = audio.decode_checked(data)
            if abs(there - len(wave)) > audio.slack_samples(info):
                raise WrongSuccess(f"{there} samples are packed of {len(wave)}")
        return whole


def _read_back(index: Index) -> None:
    with contextlib.closing(ShardReader(index)) as reader:
        for shard in range(index.shards.num_rows):
            rows = index.rows(shard)
            for row, samples in enumerate(rows.samples.tolist()):
                if len(audio.decode(bytes(reader.member(rows, row)))) != samples:
                    raise WrongSuccess(f"{rows.table['key'][row]} does not decode to {samples} samples")
