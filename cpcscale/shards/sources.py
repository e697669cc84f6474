"""Finding the audio to pack: the files of a tree, with speaker and language from the manifests beside them."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cpcscale import audio, storage
from cpcscale.errors import UserError, nearest

log = logging.getLogger(__name__)

MANIFEST = "manifest.csv"
_COLUMNS = ("path", "speaker", "language")


@dataclass(frozen=True)
class Source:
    """One audio file as found: `path` to read it, `name` relative to the source, its speaker or recording."""

    path: str
    name: str
    group: str
    language: str


def find_sources(root: str) -> list[Source]:
    """The audio files below `root`, with speaker and language from any `manifest.csv` (path, speaker, language) there.

    The manifest nearest to a file counts. A file without a speaker is a group of its own. Raises UserError when there
    is no folder, no audio in it, or a manifest that is not such a table.
    """
    if not root or not storage.exists(root):
        raise UserError(f"there is no folder {root!r}: check the path of the audio to pack")
    root = storage.absolute(root)
    names = storage.list_files(root)
    audible = [name for name in names if name.lower().endswith(audio.SUFFIXES)]
    if not audible:
        raise UserError(f"no audio below {root}: expected files ending in {', '.join(audio.SUFFIXES)}")
    known: dict[str, dict[str, str]] = {}
    manifests = [name for name in names if posixpath.basename(name) == MANIFEST]
    for name in sorted(manifests, key=lambda name: name.count("/")):
        known |= _manifest(storage.join(root, name), posixpath.dirname(name), set(audible))
    return [_source(root, name, known.get(name, {})) for name in audible]


def utterance_keys(names: Sequence[str]) -> dict[str, str]:
    """A WebDataset key for each file name: the name without suffix, dots and odd characters replaced, unique.

    The key of a name follows from the name and from whether another one wants the same key.
    """
    plain = {name: re.sub(r"[^A-Za-z0-9_/-]", "_", name.rpartition(".")[0].lstrip("/")) for name in names}
    wanted = Counter(plain.values())
    return {
        name: key if wanted[key] == 1 else f"{key}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        for name, key in plain.items()
    }


def _source(root: str, name: str, row: dict[str, str]) -> Source:
    return Source(storage.join(root, name), name, row.get("speaker") or name, row.get("language") or "")


def _manifest(url: str, folder: str, audible: set[str]) -> dict[str, dict[str, str]]:
    """The rows of one manifest by the file they name, relative to the root as `audible` is."""
    try:
        reader = csv.DictReader(io.StringIO(storage.read(url).decode("utf-8-sig"), newline=""))
        columns = list(reader.fieldnames or [])
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{url} is not a CSV table in UTF-8 ({error}): write it again, or rename the file") from None
    if "path" not in columns:
        has = f"it has {', '.join(columns)}" if columns else "it is empty"
        raise UserError(f"{url} has no column `path` ({has}): add it, or rename the file")
    if "speaker" not in columns:
        hint = nearest("speaker", columns)
        log.warning("%s has no column `speaker`%s: each file counts as a speaker of its own", url, hint)
    known: dict[str, dict[str, str]] = {}
    for row in rows:
        values = {column: (row.get(column) or "").strip() for column in _COLUMNS}
        name = posixpath.normpath(posixpath.join(folder, values["path"]))
        if known.setdefault(name, values)["speaker"] != values["speaker"]:
            raise UserError(
                f"{url} names {values['path']} for two speakers, {known[name]['speaker']!r} and {values['speaker']!r}: "
                "a file has one"
            )
    lost = [name for name in known if name not in audible]
    if lost:
        log.warning(
            "%s: %d of its %d paths name no audio file here; the first: %s", url, len(lost), len(known), lost[0]
        )
    return known
