"""A job of predictions with an output, which goes on after any end: its parts are published one by one beside it.

OUT.manifest.json   what the job is: digests of model and inputs, settings; at the end also that of the output
OUT.lease/          the process that makes it, while it does (verbs/recognisers.py)
OUT.parts/          a file for each part that is done: for each of its inputs, a line with the list of its rows
OUT                 written last, of the parts in order; then the parts are removed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpcscale import config, storage
from cpcscale.errors import UserError
from cpcscale.serve.inputs import Part
from cpcscale.serve.table import Row, write_table

# Reasons that may pass without a change of the file, such as a right that is missing or a disk that is not there.
_UNREAD = ("missing", "unreadable")


def part_name(part: Part) -> str:
    """The name of the file of a part."""
    return f"{part.number:06d}.jsonl"


def write_rows(folder: str, part: Part, found: Sequence[Sequence[Row]]) -> None:
    """Publishes the rows of each input of a part."""
    lines = "".join(f"{json.dumps(rows)}\n" for rows in found)
    storage.write(storage.join(folder, part_name(part)), lines.encode())


def read_rows(folder: str, part: Part) -> list[list[Row]]:
    """The rows of each input of a part that is published, else none."""
    try:
        return _parsed(storage.join(folder, part_name(part)))
    except storage.NotFoundError:
        return []


def is_unread(rows: Sequence[Row]) -> bool:
    """Whether an input could not be read, and may be by now."""
    return any(row["reason"] in _UNREAD for row in rows)


def _parsed(url: str) -> list[list[Row]]:
    return [json.loads(line) for line in storage.read(url).splitlines()]


class Job:
    """The job that writes the table `out`; `identity` is all that decides its bytes, `about` is for people."""

    def __init__(self, out: str, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.out, self.parts = out, f"{out}.parts"
        self._manifest_url = f"{out}.manifest.json"
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._manifest = {"job": digest, **identity, **about}
        known = self._known() or {}
        self.goes_on = known.get("job") == digest and "output" not in known

    def begin(self, *, force: bool) -> set[str]:
        """The names of the parts that are done, if this job was started before; not those with an input `is_unread`.

        Raises UserError for an output that exists, or is being made by another job, unless `force` is given.
        """
        if self.goes_on:
            names = storage.list_files(self.parts) if storage.exists(self.parts) else []
            return {name for name in names if not any(map(is_unread, _parsed(storage.join(self.parts, name))))}
        known = self._known()
        if known is None and storage.exists(self.parts):
            raise UserError(f"{self.parts} is not of a job of this program: remove it, or give --out another name")
        if not force and known and "output" not in known:
            raise UserError(
                f"{self.out} is being made of other audio, by another model or with other options: give that command "
                "again to go on with it, --force to begin anew, or --out another name"
            )
        if not force and storage.exists(self.out):
            raise UserError(f"{self.out} exists: give --force to replace it, or --out another name")
        storage.remove(self.parts)
        self._write(self._manifest)
        return set()

    def end(self, columns: Sequence[str], names: Sequence[str]) -> dict[str, int]:
        """Writes the output of these parts in order; counts its inputs, those without a value, and its rows."""
        counts = {"inputs": 0, "without_value": 0, "rows": 0}

        def rows() -> Iterator[Row]:
            for name in names:
                for found in _parsed(storage.join(self.parts, name)):
                    counts["inputs"] += 1
                    counts["without_value"] += all(row["reason"] for row in found)
                    counts["rows"] += len(found)
                    yield from found

        write_table(self.out, columns, rows())
        digest = hashlib.sha256()
        for chunk in storage.chunks(self.out):
            digest.update(chunk)
        self._write({**self._manifest, **counts, "output": digest.hexdigest()})
        storage.remove(self.parts)
        return counts

    def _known(self) -> dict[str, Any] | None:
        try:
            return dict(config.read_json(storage.read(self._manifest_url)))
        except storage.NotFoundError:
            return None
        except UserError:
            raise
        except (ValueError, TypeError):
            return None

    def _write(self, manifest: Mapping[str, Any]) -> None:
        storage.write(self._manifest_url, (json.dumps(manifest, indent=1) + "\n").encode())
