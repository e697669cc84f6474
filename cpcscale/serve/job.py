"""A job of predictions with an output, which goes on after any end: its parts are published one by one beside it.

OUT.manifest.json   what the job is: digests of model and inputs, settings; at the end also that of the output
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
from cpcscale.serve.table import Row, write_table


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
        """The names of the parts that are done, if this job was started before.

        Raises UserError for an output that exists, or is being made by another job, unless `force` is given.
        """
        if self.goes_on:
            return {*storage.list_files(self.parts)} if storage.exists(self.parts) else set()
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
                for line in storage.read(storage.join(self.parts, name)).splitlines():
                    found = json.loads(line)
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
