"""The one error a user can cause, and the signal to stop.

A UserError says in one line what is wrong, with the offending value, why it matters and the way out. The command line
prints that line and exits with status 2; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake: its message is one line with what, why and the way out."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C; its message says what was done first, if anything was."""


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean X?)` for the known word closest to `word`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
