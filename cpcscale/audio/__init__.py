"""The one door for audio: what a file is, how long it is, whether it is speech, its samples at 16 kHz mono.

A file is what its first bytes say, whatever its name. One whose audio was cut off, or goes on behind the end that its
header states, is refused: pack, index, audit and the readers of labelled audio all come through here.

Samples are float32 in [-1, 1) or int16. Everywhere, int16 = clip(rint(x * 32768)) and x = int16 / 32768, so a 16-bit
source comes back bit for bit.
"""

from cpcscale.audio.encoding import CODECS, RATE_HZ, encode
from cpcscale.audio.files import (
    SUFFIXES,
    AudioInfo,
    Source,
    check_stream,
    decode,
    decode_blocks,
    decode_checked,
    read_header,
    slack_samples,
)
from cpcscale.audio.samples import Samples, Sliced, open_samples
from cpcscale.audio.slices import check_slices, decode_slice
from cpcscale.audio.sound import Level, SoundLimits, SoundMeter, check_sound, measure, to_int16
from cpcscale.errors import AudioError

__all__ = [
    "CODECS",
    "RATE_HZ",
    "SUFFIXES",
    "AudioError",
    "AudioInfo",
    "Level",
    "Samples",
    "Sliced",
    "SoundLimits",
    "SoundMeter",
    "Source",
    "check_slices",
    "check_sound",
    "check_stream",
    "decode",
    "decode_blocks",
    "decode_checked",
    "decode_slice",
    "encode",
    "measure",
    "open_samples",
    "read_header",
    "slack_samples",
    "to_int16",
]
