"""Ways to damage a file, and what is known of the result."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

# Numbers at which readers trip.
_SIZES = (0, 1, 2, 3, 255, 256, 65_535, 65_536, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE)
_LONG_SIZES = (*_SIZES, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
# Texts at which readers of tables, JSON and YAML trip.
_WORDS = (
    *(",", ";", "\t", "\r", "\n", "\r\n", '"', '""', "'", "\0", "\ufeff", " ", "\u00a0", "\u2028", "\x0b", "\x1c"),
    *("nan", "NaN", "inf", "-inf", "1e999", "-1", "0", "1e-400", "9" * 400, "0x10", "1_000", "3,5", "1.0", "007"),
    *("null", "None", "true", "yes", "~", "???", "${a}", "${oc.env:HOME}", "&a", "*a", "<<", "!!int", "!!timestamp"),
    *("{", "}", "[", "]", "[" * 20_000, "{}", "[]", '{"a":' * 5_000, ":", ": ", "- ", "#", "\\", "\\ud800", "\\u0000"),
    *(
        "\u00e9",
        "e\u0301",
        "\U0001f3a4",
        "../",
        "/",
        "//",
        "s3://",
        ".",
        "..",
        "\u0661",
        "path",
        "start",
        "a" * 200_000,
    ),
)


def damaged(rng: random.Random, data: bytes, others: Sequence[bytes], text: bool) -> tuple[bytes, str]:
    """(the data changed in one to four ways, what was done); "none", "cut" or "doubled" where only that was done."""
    ways = _TEXT_WAYS if text and rng.random() < 0.7 else _BYTE_WAYS
    whole = rng.random()
    if whole < 0.03:
        return data, "none"
    if whole < 0.09 and data:
        return data[: rng.randrange(len(data))], "cut"
    if whole < 0.12:
        return data * 2, "doubled"
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = rng.choice(ways)(rng, data, others)
    return data, "changed"


def _at(rng: random.Random, data: bytes) -> int:
    """A place in the data; headers are tried more often."""
    return rng.randrange(min(len(data), rng.choice((16, 64, 256, 1024, len(data)))) or 1) if data else 0


def _flip(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[_at(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _byte(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = _at(rng, data)
    return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[at + 1 :]


def _number(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at, form = _at(rng, data), rng.choice(("<H", ">H", "<I", ">I", "<I", ">I", "<Q", ">Q"))
    at -= at % 2 if rng.random() < 0.7 else 0
    values = _LONG_SIZES if form[1] == "Q" else _SIZES
    limit = 1 << 8 * struct.calcsize(form)
    value = rng.choice((rng.choice(values), rng.randrange(limit), len(data), len(data) * 2)) % limit
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


def _removed(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = _at(rng, data)
    return data[:at] + data[at + rng.choice((1, 2, 4, 512, rng.randrange(len(data) + 1))) :]


def _inserted(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = _at(rng, data)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 64, 512, 5000))) + data[at:]


def _repeated(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = _at(rng, data)
    part = data[at : at + rng.choice((1, 4, 64, 512, 4096))]
    return data[:at] + part * rng.choice((2, 3, 50)) + data[at + len(part) :]


def _zeroed(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at, count = _at(rng, data), rng.choice((4, 64, 512, 4096))
    return data[:at] + bytes(min(count, max(0, len(data) - at))) + data[at + count :]


def _cut(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: _at(rng, data)] if rng.random() < 0.3 else data[: rng.randrange(len(data) + 1)]


def _spliced(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others) if others else data
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _swapped(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    first, second = sorted((_at(rng, data), _at(rng, data)))
    size = min(rng.choice((4, 8, 512)), second - first)
    return (
        data[:first]
        + data[second : second + size]
        + data[first + size : second]
        + data[first : first + size]
        + data[second + size :]
    )


def _followed(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    tags = b"TAG" + bytes(125), b"ID3\x04\0\0\0\0\0\x40" + bytes(64)
    return data + rng.choice((b"\0" * 1000, *tags, rng.randbytes(700)))


def _word(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    word = rng.choice(_WORDS).encode("utf-8", "surrogatepass")
    at = rng.randrange(len(data) + 1)
    return data[:at] + word + data[at + rng.choice((0, 0, len(word), 1)) :]


def _cell(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Another content for what stands between two separators."""
    marks = [at for at, byte in enumerate(data) if byte in b',;\t\n:{}[] "=']
    if len(marks) < 2:
        return data
    place = rng.randrange(len(marks) - 1)
    word = rng.choice(_WORDS).encode("utf-8", "surrogatepass")
    return data[: marks[place] + 1] + word + data[marks[place + 1] :]


def _line(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    at = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        case 1:
            del lines[at]
        case 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        case _:
            lines[at] = lines[at].rstrip(b"\r\n") + rng.choice((b"", b",", b"\t", b",,,\n", b"\r", b"\r\n"))
    return b"".join(lines)


def _form(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """The same text in another encoding, with other line ends or separators."""
    text = data.decode(errors="replace")
    return rng.choice(
        (
            text.encode("utf-16"),
            text.encode("latin-1", "replace"),
            b"\xef\xbb\xbf" + data,
            data.replace(b"\n", b"\r\n"),
            data.replace(b"\n", b"\r"),
            data.replace(b",", b";"),
            data.replace(b",", b"\t"),
            data.replace(b".", b","),
            data.replace(b'"', b"'"),
        )
    )


_Way = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
_BYTE_WAYS: tuple[_Way, ...] = (
    *(_flip, _byte, _number, _number, _removed, _inserted, _repeated, _zeroed, _cut, _spliced, _swapped, _followed),
)
_TEXT_WAYS: tuple[_Way, ...] = (_word, _word, _cell, _cell, _cell, _line, _line, _form, _flip, _cut, _spliced)
