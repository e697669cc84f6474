"""The errors for a user's mistake and for audio that cannot be used, and the one for a request to stop.

A UserError says in one line what is wrong, with the value, why it matters and what to do. The command line prints that
line and exits with status 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger(__name__)
_warned: set[str] = set()
# Cells and keys of damaged files may be long; the way out comes last in a message.
_MOST_SHOWN = 1500


class UserError(ValueError):
    """Raised for a user's mistake: the message is one line with what, why and the way out.

    It may quote a damaged file, so what cannot be printed is escaped, and the middle of a very long one is left out.
    """

    def __str__(self) -> str:
        text = " ".join(shown_name(super().__str__()).split())
        if not text.isprintable():
            text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
        return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN // 2]} ... {text[-_MOST_SHOWN // 2 :]}"


class AudioError(UserError):
    """Raised for bytes that cannot be used as speech; `cause` is one word for the quarantine table.

    `seconds` is how much audio is lost with them, where it is known.
    """

    def __init__(self, cause: str, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.cause, self.seconds = cause, seconds

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str, float | None]]:
        # An exception is unpickled from its args alone, and this one takes three. Workers send it to their driver.
        return AudioError, (self.cause, str(self), self.seconds)


class Terminated(KeyboardInterrupt):
    """Raised on the signals of signals.ENDING, as KeyboardInterrupt is on Ctrl-C; the message says what was done."""


@contextlib.contextmanager
def optional(what: str, instead: str) -> Iterator[None]:
    """A block that a run can do without: an OSError or UserError ends the block, not the run.

    The first one of each `what` in this process is a warning, with the cause and what is done `instead`.
    """
    try:
        yield
    except (OSError, UserError) as error:
        if what not in _warned:
            _warned.add(what)
            why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            log.warning("%s (%s): %s", what, why, instead)


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean X?)` for the known word closest to `word`, or an empty string when none is close.

    Of words with dots, those of the same group are compared by their last part.
    """
    import difflib

    group, dot, last = word.rpartition(".")
    inside = [each.removeprefix(f"{group}.") for each in known if dot and each.startswith(f"{group}.")]
    close = difflib.get_close_matches(last, inside, n=1, cutoff=0.6)
    found = f"{group}.{close[0]}" if close else ""
    if not inside:
        found = next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), "")
    return f" (did you mean {found}?)" if found else ""


def shown_name(name: str) -> str:
    """The name of a file as valid text: bytes that are not UTF-8 are escaped."""
    return name.encode(errors="backslashreplace").decode()
