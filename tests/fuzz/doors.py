"""What a door is: files that it accepts, and how to pass a damaged one through it and check what comes out."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cpcscale.errors import UserError


class WrongSuccess(AssertionError):
    """Raised for an input that was accepted and is not what the door says it is."""


@dataclass(frozen=True)
class Door:
    """`seeds` are valid files by the name of the target, which `enter(target, data, done)` reads as `data`.

    `done` is what was done to it, as `mutate.damaged` says. `enter` returns whether the data was accepted, or raises
    UserError where the door refuses it.
    """

    name: str
    seeds: Mapping[str, bytes]
    enter: Callable[[str, bytes, str], bool]
    text: bool = False
    weight: float = 1.0

    def verdict(self, target: str, data: bytes, done: str) -> tuple[str, str]:
        """("accepted" or "refused" or "fault", what happened)."""
        try:
            return ("accepted", "") if self.enter(target, data, done) else ("refused", "reported")
        except UserError as error:
            message = str(error)
            if not message.isprintable() or not 0 < len(message) < 2000:
                return "fault", f"a message that is not one line of text: {message[:300]!r}"
            return ("fault", f"an unmutated file is refused: {message}") if done == "none" else ("refused", message)
        except WrongSuccess as error:
            return "fault", f"wrong success: {error}"
        except Exception:  # noqa: BLE001
            return "fault", traceback.format_exc()


class Folder:
    """A folder of valid files, of which one is damaged at a time, and that is whole again afterwards."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def put(self, target: str, data: bytes) -> None:
        """Makes the folder whole, but for this file."""
        for path in self.root.rglob("*"):
            if path.is_file() and str(path.relative_to(self.root)) not in self.files:
                path.unlink()
        for name, whole in self.files.items():
            path = self.root / name
            wanted = data if name == target else whole
            if not path.is_file() or path.read_bytes() != wanted:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(wanted)


def emptied(folder: Path) -> Path:
    """The folder, new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
