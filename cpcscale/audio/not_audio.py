"""What a file is that libsndfile does not read, by its first bytes, and how to get the audio."""

from __future__ import annotations

HEAD_BYTES = 1024

_CONVERT = "convert it, as `ffmpeg -i OLD NEW.flac` does"
_FETCH = "fetch the audio again"
# (the bytes, where they stand, the cause, what the file is and the way out). Text is compared in lower case and without
# white space before it.
_TEXTS = (
    (b"version https://git-lfs", "pointer", "a git-lfs pointer and not the audio: run `git lfs pull`"),
    (b"/annex/objects/", "pointer", "a git-annex pointer and not the audio: run `git annex get`"),
    (b"<!doctype", "unreadable", f"a web page: {_FETCH}"),
    (b"<html", "unreadable", f"a web page: {_FETCH}"),
    (b"<?xml", "unreadable", f"an XML text, as a store answers when it refuses: {_FETCH}"),
    (b"{", "unreadable", f"a text in JSON, as a server answers when it refuses: {_FETCH}"),
)
_BYTES = (
    (0, b"\x1f\x8b", "compressed by gzip: unpack it"),
    (0, b"PK\x03\x04", "a zip archive: unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
    (257, b"ustar", "a tar: unpack it, or index it with `cpcscale index`"),
    (0, b"\x1aE\xdf\xa3", f"WebM or Matroska: {_CONVERT}"),
    (4, b"ftyp", f"MP4 (AAC, .m4a): {_CONVERT}"),
    (0, b"\xff\xf1", f"AAC: {_CONVERT}"),
    (0, b"\xff\xf9", f"AAC: {_CONVERT}"),
    (0, b"#!AMR", f"AMR: {_CONVERT}"),
    (0, b"\x30\x26\xb2\x75", f"Windows Media: {_CONVERT}"),
)


def what_else(head: bytes) -> tuple[str, str] | None:
    """(cause, what it is and the way out) of a file with these first HEAD_BYTES; None if they are not known."""
    text = head.lstrip().lower()
    for start, cause, what in _TEXTS:
        if text.startswith(start):
            return cause, what
    if head.startswith(b"NIST_1A\n") and b"embedded-shorten" in head:
        return "unreadable", "SPHERE with samples packed by shorten: convert it, as `sph2pipe -f wav OLD NEW.wav` does"
    return next(
        (("unreadable", what) for at, magic, what in _BYTES if head.startswith(magic, at)),
        None,
    )
