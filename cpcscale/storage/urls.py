"""The spelling of places: one string for each path or s3:// URL, and no string for what is neither.

Runs, leases, caches and tracking know a place by its string, and some stores list `a//b` as `a/b`. So every URL goes
through `absolute` before it is used.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from cpcscale import config
from cpcscale.errors import UserError

# `word:` at the start, as in pipe:cat; a single letter may be a name or a drive.
_SCHEME_LIKE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
# Empty parts, `.`, `..`, a slash at the end.
_FOLDED = re.compile(r"/\.{0,2}(/|$)")
# Line ends and characters that a store's XML cannot hold: some stores accept such a key and then fail to list it.
_NO_KEY = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


def join(base: str, *parts: str) -> str:
    """`base/part/part`, for local paths and URLs alike."""
    return "/".join([*([base.rstrip("/")] if base else []), *parts])


def absolute(url: str) -> str:
    """The one spelling of a place: an absolute local path, or `s3://bucket/key`.

    Schemes in capitals, `file://`, `~`, empty parts, `.`, `..` and slashes at the end are resolved; links are not, but
    `LINK/..` is the folder above the link's target. Unicode forms stay as they are: é in NFC and in NFD are two names.
    Raises UserError for what is neither a path nor an s3:// URL.
    """
    if not url:
        raise UserError("a path is empty: name a folder or file, or an s3:// URL")
    shown = repr(config.redact(url))
    if url != url.strip().strip("|"):
        raise UserError(f"{shown} begins or ends with a space or a |, as a command may: name a path or an s3:// URL")
    scheme, separator, rest = url.partition("://")
    if not separator:
        if _SCHEME_LIKE.match(url):
            raise UserError(
                f"{shown} reads as a command or a URL of another kind, which is never run: "
                f"name a path (./NAME for a file whose name holds a colon) or an s3:// URL"
            )
        return _local(url, shown)
    if (scheme := scheme.lower()) not in ("file", "s3"):
        raise UserError(f"{shown} has the scheme {scheme}://, which is not supported: use a path or s3://")
    if "@" in rest.partition("/")[0]:
        raise UserError(f"{shown} holds credentials: give them as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY")
    if scheme == "s3":
        return f"s3://{_key(rest, shown)}"
    path = os.fsdecode(unquote_to_bytes(os.fsencode(rest)))
    return _local(path.removeprefix("localhost") if path.startswith("localhost/") else path, shown)


def shown(url: str) -> str:
    """`url` as a person would type it: relative where it is below the current folder."""
    path = Path(url)
    return str(path.relative_to(Path.cwd())) if "://" not in url and path.is_relative_to(Path.cwd()) else url


def local_path(url: str) -> Path | None:
    """The local path of `url`, or None for an object store."""
    place = absolute(url)
    return None if place.startswith("s3://") else Path(place)


def _key(rest: str, shown: str) -> str:
    if _NO_KEY.search(rest):
        raise UserError(f"{shown} has a line end or another control character, which no key in a store may have")
    if "?versionId=" in rest:
        raise UserError(f"{shown} names a version of an object, which cannot be read: copy it to a key of its own")
    parts: list[str] = []
    for part in rest.split("/"):
        if part == ".." and len(parts) > 1:
            parts.pop()
        elif part == "..":
            raise UserError(f"{shown} leaves its bucket by `..`: name the bucket and the key")
        elif part not in ("", "."):
            parts.append(part)
    if not parts:
        raise UserError(f"{shown} names no bucket: write s3://BUCKET/KEY")
    return "/".join(parts)


def _local(path: str, shown: str) -> str:
    if "\0" in path:
        raise UserError(f"{shown} has a NUL, which no path may have")
    if path.startswith("~"):
        with contextlib.suppress(RuntimeError):  # No such user: a name that begins with ~.
            path = str(Path(path).expanduser())
    if not path.startswith("/"):
        path = f"{Path.cwd()}/{path}"
    if not _FOLDED.search(path):
        return path
    place = ""
    for part in path.split("/"):
        if part == "..":
            # The folder above a link is not the folder above its target.
            below = Path(place or "/")
            place = str((below.resolve() if below.is_symlink() else below).parent).rstrip("/")
        elif part not in ("", "."):
            place = f"{place}/{part}"
    return place or "/"
