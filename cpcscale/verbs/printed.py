"""What verbs print, and what they refuse alike."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from typing import Any

from cpcscale.errors import UserError


def refuse_settings(options: argparse.Namespace, verb: str) -> None:
    if options.overrides:
        raise UserError(f"`{verb}` takes a path and no settings such as {options.overrides[0]}")


def show(options: argparse.Namespace, result: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Prints the result as one JSON object, or as lines for a person."""
    if options.json:
        emit(result)
    else:
        print("\n".join(lines))


def emit(result: Mapping[str, Any]) -> None:
    print(json.dumps(result))
