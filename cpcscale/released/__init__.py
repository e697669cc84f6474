"""Recognisers that the package brings: each is a folder below this one, and has the folder's name.

Wherever a model is named, the bare name of one of them means the one that is here, also if the current folder has a
folder of that name: `./emotion-small` is that folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from cpcscale.errors import UserError, nearest

_HERE = Path(__file__).parent
_BARE = re.compile(r"[\w.-]+")


def names() -> list[str]:
    """The names of the released recognisers."""
    return sorted(place.parent.name for place in _HERE.glob("*/COMPLETE.json"))


def folder(model: str) -> str:
    """The folder of the released recogniser of this name, "" for what is no such name.

    Raises UserError for a bare name that is nearly one, and no path.

    >>> folder("./emotion-small"), folder("runs/mine/recogniser")
    ('', '')
    >>> folder("emotion-smal")
    Traceback (most recent call last):
    cpcscale.errors.UserError: there is no model emotion-smal (did you mean emotion-small?): released are \
emotion-small; a folder is named by its path, as ./emotion-smal
    """
    known = names()
    if model in known:
        return str(_HERE / model)
    if _BARE.fullmatch(model) and (near := nearest(model, known)) and not Path(model).exists():
        raise UserError(
            f"there is no model {model}{near}: released are {', '.join(known)}; a folder is named by its path, as "
            f"./{model}"
        )
    return ""
