"""What became of the audio that a pack or an index found: taken, left out with a cause, passed over."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Suffixes of audio that libsndfile does not decode.
_OTHER_AUDIO = (".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".mov", ".avi", ".wma", ".amr", ".3gp", ".ape", ".wv")
# Suffixes of archives, whose audio is to be unpacked.
ARCHIVES = (".zip", ".7z", ".rar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
# Suffixes of what audio is kept in, or what stands in its place, and how to get at it.
_KEPT_IN = {
    ".dvc": "audio that DVC tracks is fetched by `dvc pull`",
    ".tar": "tars are indexed where they are, by `cpcscale index`",
    ".parquet": "audio inside Parquet, as Hugging Face keeps it, is to be written to files",
    ".mds": "audio inside MosaicML's shards is to be written to files",
    ".ark": "audio inside Kaldi's archives is to be written to files",
    **dict.fromkeys(ARCHIVES, "archives are to be unpacked"),
}
_MOST_SUFFIXES = 8


@dataclass
class Account:
    """`found` and `taken` are (files, seconds); `left_out` has [files or pieces, seconds] by cause.

    `unknown` counts those left out whose length is not known, which are in no seconds. The seconds taken and left out
    add up to those found. `passed_over` counts files that are not audio by their suffix.
    """

    found: tuple[int, float] = (0, 0.0)
    taken: tuple[int, float] = (0, 0.0)
    left_out: dict[str, list[float]] = field(default_factory=dict)
    unknown: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)

    def leave_out(self, cause: str, seconds: float | None) -> None:
        """Adds a file or piece that is left out."""
        row = self.left_out.setdefault(cause, [0, 0.0])
        row[0] += 1
        row[1] += seconds or 0.0
        self.unknown += seconds is None

    @property
    def left_out_s(self) -> float:
        """The seconds that are left out, as far as they are known."""
        return sum(seconds for _, seconds in self.left_out.values())

    def values(self) -> dict[str, Any]:
        """The account for JSON."""
        return {
            "found": {"files": self.found[0], "seconds": round(self.found[1], 3)},
            "taken": {"files": self.taken[0], "seconds": round(self.taken[1], 3)},
            "left_out": {
                cause: {"count": int(count), "seconds": round(seconds, 3)}
                for cause, (count, seconds) in self.left_out.items()
            },
            "of_unknown_length": self.unknown,
            "passed_over": dict(self.passed_over),
        }


def suffix(name: str) -> str:
    """The suffix of a file name, in lower case, as files that are passed over are counted."""
    return posixpath.splitext(name)[1].lower() or "no suffix"


def lines(values: dict[str, Any], unit: str = "files") -> Iterator[str]:
    """The lines of the account that a person reads, from `Account.values`."""
    found, taken, left_out = values["found"], values["taken"], values["left_out"]
    there, used = (f"{row['files']:,} {unit} of {_time(row['seconds'])}" for row in (found, taken))
    yield f"found {there}, took {used}"
    if left_out:
        total = _time(sum(row["seconds"] for row in left_out.values()))
        unknown = f" and {values['of_unknown_length']:,} of unknown length" if values["of_unknown_length"] else ""
        causes = ", ".join(f"{row['count']:,} {cause}" for cause, row in left_out.items())
        yield f"left out {total}{unknown}: {causes}"
    if values["passed_over"]:
        yield f"passed over {passed_over(values['passed_over'])}"


def passed_over(suffixes: dict[str, int]) -> str:
    """How many files were passed over, by suffix, and what to do about audio among them."""
    hints = dict.fromkeys(_OTHER_AUDIO, "") | _KEPT_IN
    ranked = sorted(suffixes.items(), key=lambda pair: (pair[0] not in hints, -pair[1], pair[0]))
    shown = ", ".join(f"{count:,} {name}" for name, count in ranked[:_MOST_SUFFIXES])
    more = ", and others" if len(ranked) > _MOST_SUFFIXES else ""
    other = next((name for name, _ in ranked if name in _OTHER_AUDIO), "")
    convert = f"libsndfile does not decode {other}: convert it, as `ffmpeg -i OLD{other} NEW.flac` does"
    ways_out = dict.fromkeys(hints[name] or convert for name, _ in ranked if name in hints)
    return "; ".join([f"{sum(suffixes.values()):,} files ({shown}{more})", *ways_out])


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} h" if seconds >= 3600 else f"{seconds:,.1f} s"
