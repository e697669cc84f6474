"""One string for each place: every spelling of it gives that string, and two places keep two."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.runs.ledger import Ledger

# Names that a store may hold, also those that some code takes for more than a name.
PARTS = st.sampled_from(
    [
        "a",
        "b",
        "A",
        "my.bucket",
        "x y",
        "100%",
        "%2F",
        "a+b",
        "q?x=1",
        "h#x",
        "...",
        "~",
        "e\u0301",
        "\u00e9",
        "s3:",
        "語",
    ]
)
PLACES = st.lists(PARTS, min_size=1, max_size=4)
# What may stand between two parts without a change of the place.
BETWEEN = st.lists(st.sampled_from(["", ".", "x/..", "x/./y/../.."]), max_size=3)


@st.composite
def spellings(draw: st.DrawFn) -> tuple[list[str], str]:
    """(parts, one spelling of the place that they name, after the scheme)."""
    parts = draw(PLACES)
    text = parts[0]
    for part in parts[1:]:
        text += "/" + "/".join([*draw(BETWEEN), part])
    return parts, text + draw(st.sampled_from(["", "/", "//", "/.", "/x/.."]))


@given(spellings(), st.sampled_from(["s3://", "S3://", "s3:///"]))
def test_every_spelling_of_a_place_in_a_store_is_one_string(spelled, scheme):
    parts, text = spelled
    place = f"s3://{'/'.join(parts)}"
    assert storage.absolute(f"{scheme}{text}") == place
    assert storage.absolute(place) == place
    assert storage.local_path(place) is None


@given(spellings(), st.sampled_from(["/", "//", "///", "file:///", "FILE:///", "file://localhost/"]))
@example((["%41"], "%41"), "/")
def test_every_spelling_of_a_local_place_is_one_string(spelled, start):
    parts, text = spelled
    place = f"/{'/'.join(parts)}"
    if start.lower().startswith("file"):
        text = text.replace("%", "%25")
    assert storage.absolute(f"{start}{text}") == storage.absolute(place) == place
    assert storage.local_path(f"{start}{text}") == Path(place)


@given(PLACES, PLACES)
def test_two_places_are_two_strings(one, other):
    for scheme in ("s3://", "/"):
        strings = {storage.absolute(f"{scheme}{'/'.join(parts)}") for parts in (one, other)}
        assert len(strings) == (1 if one == other else 2)


def test_the_folder_above_a_link_is_that_above_its_target(tmp_path, monkeypatch):
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "runs")
    assert storage.absolute(f"{tmp_path}/link/../x") == f"{tmp_path}/disk/x"
    assert Path(storage.absolute(f"{tmp_path}/link/..")).samefile(f"{tmp_path}/link/..")
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("./a//b/../c/") == storage.absolute("a/c") == f"{tmp_path}/a/c"
    assert storage.absolute("~nobody-here/x") == f"{tmp_path}/~nobody-here/x"
    assert storage.absolute("file:///a%20b") == Path("/a b").as_posix() == storage.absolute(Path("/a b").as_uri())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://b/a\nb", "line end"),
        ("s3://b/a\r", "space"),
        ("s3://b/a\x07b", "control character"),
        ("s3://b/a\u2028b", "line end"),
        ("s3://b/\udcff.wav", "control character"),
        ("s3://", "names no bucket"),
        ("s3:///", "names no bucket"),
        ("s3://b/../c", "leaves its bucket"),
        ("S3://b/x/../../c", "leaves its bucket"),
        ("s3://b/x?versionId=7", "version"),
        ("S3A://b/x", "not supported"),
        ("/a\0b", "NUL"),
    ],
    ids=range(12),
)
def test_what_names_no_place_is_refused_in_one_line_before_any_request(url, words):
    for action in (storage.absolute, storage.read, lambda url: storage.write(url, b"x")):
        with pytest.raises(UserError, match=words) as caught:
            action(url)
        assert len(str(caught.value).splitlines()) == 1
        assert str(caught.value).isprintable()


def test_a_run_has_one_ledger_however_its_folder_is_spelled(s3, tmp_path):
    run = f"{s3.base}/{tmp_path.name}/run"
    for url in (f"{run}/", run.replace("s3://", "S3://"), f"{s3.base}//{tmp_path.name}/./x/../run"):
        ledger = Ledger(url)
        assert ledger.run_dir == run
        state = ledger.head().started_from(0, "")
        assert ledger.advance(state) and ledger.is_head(state)
    assert Ledger(run).head().number == 3
