"""Promises of tables: read by one rule whatever wrote them, and what is not understood is an error with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale.tables import Table, TableError, identity, is_unknown, nearest_name, nfc, number, seconds

COLUMNS = ["path", "speaker", "note"]
CELLS = st.text("abä.,;'\" 1語\n", max_size=6).map(str.strip)
ROWS = st.lists(st.lists(CELLS, min_size=3, max_size=3).filter(any), max_size=12)


def table(tmp_path: Path, data: str | bytes, name: str = "t.csv") -> Table:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return Table(str(path))


def cells(given_: Table) -> list[list[str]]:
    return [[row[column] for column in given_.columns] for row in given_.rows()]


def refusal(tmp_path: Path, data: str | bytes) -> str:
    with pytest.raises(TableError) as caught:
        cells(table(tmp_path, data))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(
    rows=ROWS,
    separator=st.sampled_from(",;\t"),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    marks=st.integers(0, 2),
    space=st.sampled_from(["", " "]),
    packed=st.booleans(),
)
def test_the_same_rows_are_read_whatever_program_wrote_them(folder, rows, separator, ends, marks, space, packed):
    text = io.StringIO()
    # With \r alone, Python's writer leaves a cell with \n bare.
    quoting = csv.QUOTE_ALL if separator == "\t" or ends == "\r" else csv.QUOTE_MINIMAL
    csv.writer(text, delimiter=separator, lineterminator=ends, quoting=quoting).writerows([COLUMNS, *rows])
    # A blank after the header's separators; in the rows it could stand between quotation marks.
    header, end, body = text.getvalue().partition(ends)
    data = ("\ufeff" * marks + header.replace(separator, separator + space) + end + body + ends + ends).encode()
    read = table(folder, gzip.compress(data) if packed else data)
    assert read.columns == tuple(COLUMNS)
    assert cells(read) == rows
    batches = list(read.batches(["speaker", "absent", "path"]))
    assert [cell for batch in batches for cell in batch[0]] == [row[1] for row in rows]
    assert [cell for batch in batches for cell in batch[1]] == [""] * len(rows)


@given(rows=ROWS)
def test_json_lines_hold_what_a_csv_holds(folder, rows):
    lines = "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n\n" for row in rows)
    read = table(folder, "\ufeff" + lines if lines else "{}")
    assert cells(read) == (rows or [[]])


def test_a_space_after_the_comma_is_no_part_of_a_cell_and_quotes_may_follow_it(tmp_path):
    assert cells(table(tmp_path, 'path, speaker\na.wav, "Doe, Jo"\n b.wav ,  x\n')) == [
        ["a.wav", "Doe, Jo"],
        ["b.wav", "x"],
    ]


def test_in_a_table_of_tabs_quotation_marks_are_characters(tmp_path):
    read = table(tmp_path, 'path\tsentence\na.wav\t"Yes, he said\nb.wav\t"x" y\n')
    assert cells(read) == [["a.wav", '"Yes, he said'], ["b.wav", '"x" y']]


def test_keys_that_only_some_lines_have_are_columns_and_empty_elsewhere(tmp_path):
    read = table(tmp_path, '{"path": "a", "n": 1}\n{"path": "b", "who": {"id": 7.0}, "n": null}\n')
    assert read.columns == ("path", "n", "who")
    assert list(read.batches(["n", "who.id"])) == [[["1", ""], ["", "7.0"]]]
    assert read.has("who.id")
    assert not read.has("what.id")
    with pytest.raises(TableError, match=r"t\.csv line 2, column who holds a dict"):
        cells(read)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["a,b", "1,2", "1,2,3"], "line 3 has 3 cells, and the header has 2"),
        (["a,b", "1,2", "", ",", "1"], "line 5 has 1 cells, and the header has 2"),
        (["a,b", '"1', '1",2', "3,5,2"], "line 4 has 3 cells"),
        (["a;b", "1;2", "1;2;"], "line 3 has 3 cells"),
        (["a\tb", "1\t2\t3"], "line 2 has 3 cells"),
        (["", "a,b,a", "1,2,3"], "line 2 has two columns `a`"),
        (["a, b,b ", "1,2,3"], "line 1 has two columns `b`"),
        (["a,b", '1,"2', "3,4"], "is not a row of a table"),
        (["a,b", '1,"2"x'], "line 2 is not a row of a table"),
        (['{"a": 1}', '{"a": 1'], "line 2 is not JSON"),
        (['{"a": 1, "a": 2}'], "line 1 is not JSON (a key is there twice)"),
        (["[", '{"a": 1}', "]"], "line 1 is not JSON"),
        (['{"a": 1}', "[1]"], "line 2 holds a list, not an object"),
    ],
)
def test_what_does_not_fit_the_header_is_refused_with_its_line(tmp_path, ends, rows, words):
    assert words in refusal(tmp_path, ends.join(rows) + ends)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a,b\r1,2\rM\xfc,3\r", "line 3 is not a table in UTF-8"),
        ("a\tb\n".encode("utf-16"), "line 1 is not a table in UTF-8"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9], "cannot be unpacked"),
        (b"PAR1\x15\x04\x15\xff" + bytes(20) + b"PAR1", "is a Parquet file"),
    ],
)
def test_bytes_that_are_no_text_are_named(tmp_path, data, words):
    assert words in refusal(tmp_path, data)


def test_a_cell_that_is_no_number_is_named_by_line_and_column(tmp_path):
    first, second, third = table(tmp_path, 'path,valence\na,3.5\nb,"3,5"\nc,NaN\n').rows()
    assert first.number("valence") == 3.5
    with pytest.raises(TableError, match=r"t\.csv line 3, column valence: '3,5' is not a number: decimals have a poi"):
        second.number("valence")
    with pytest.raises(TableError, match="line 4, column valence: 'NaN' is not a number"):
        third.number("valence")
    assert math.isnan(third.number("valence", unknown=math.nan))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_as_it_was_written(value):
    assert number(repr(value)) == value


@pytest.mark.parametrize("text", ["", "3_5", "3,5", "1,000", "nan", "inf", "1e999", "0x1", "٣", "3 5", "1.2.3", "--1"])
def test_nothing_else_is_a_number(text):
    with pytest.raises(ValueError, match="is not a number"):
        number(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4.0),
        ("0.25", 0.25),
        ("0 days 00:00:04", 4.0),
        ("0 days 00:00:04.500000", 4.5),
        ("1 days 01:02:03.000000001", 90123.000000001),
        ("0 days", 0.0),
        ("00:01:00", 60.0),
    ],
)
def test_times_are_seconds_or_what_pandas_writes(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize(
    "text", ["", "-1", "-1 days +23:59:56", "NaT", "4 s", "1_0", "00:60:00", "1:2:3", "4,5", "days"]
)
def test_nothing_else_is_a_time(text):
    with pytest.raises(ValueError, match="is not a time in seconds"):
        seconds(text)


@given(st.one_of(st.text(max_size=8), st.integers(0, 99).map(str), st.sampled_from(["None", "N/A", "NULL", "<NA>"])))
def test_a_name_has_one_spelling_in_every_table(name):
    one = identity(name)
    assert identity(one) == one
    assert {identity(f" {name} "), identity(unicodedata.normalize("NFD", name))} == {one}
    assert identity(f"{one}.0") == one if one.isascii() and one.isdecimal() else True
    assert is_unknown(name) == (one == "") or not name.isascii()


def test_unknown_has_many_spellings_and_names_like_them_are_names():
    words = ["", " ", "Unknown", "nan", "NaN", "None", "NULL", "null", "N/A", "n/a", "NA", "<NA>", "#N/A", "-", "?"]
    assert {identity(word) for word in words} == {""}
    names = ["Nan Goldin", "unity", "0", "1.5", "01", "1.0.0", "a.0", "Nona"]
    assert [identity(name) for name in names] == names
    assert [identity(name) for name in ("1.0", "12.00", "3.", "0.0")] == ["1", "12", "3", "0"]


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("x/A.WAV", "upper and lower case"),
        ("x/a.mp3", "its suffix"),
        ("y/a.wav", "its folder"),
        ("x\\a.wav", "its folder"),
        ("a.flac", "its folder and suffix"),
        ("x/a .wav", "spelling"),
        ("x/7.wav", "zeros before a number"),
    ],
)
def test_the_nearest_name_is_shown_with_how_it_differs(name, differs):
    found = "x/007.wav" if "7" in name else "x/a.wav"
    names = ["x/b.wav", "x/a.wav", "x/070.wav", "x/007.wav"]
    assert nearest_name(name, names) == f"; the nearest is {found}, which differs in {differs}"


def test_names_that_are_alike_by_their_letters_are_near_and_others_are_not():
    assert nearest_name("speker_01_take_3.wav", ["speaker_01_take_3.wav"]).endswith("differs in spelling")
    for other in ("zzz.wav", "speaker_01_take_2.wav"):
        assert nearest_name(other, ["speaker_01_take_3.wav"]) == ""
    assert nfc("Mu\u0308ller") == "M\u00fcller"


@given(
    text=st.text('a,";\t\n\r{}[]:1\ufeff\0', max_size=40),
    harm=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 255)), max_size=3),
    packed=st.booleans(),
)
def test_any_bytes_are_a_table_or_an_error_of_one_line(folder, text, harm, packed):
    data = text.encode()
    data = bytearray(gzip.compress(data) if packed else data)
    for at, byte in harm:
        if at < len(data):
            data[at] = byte
    try:
        read = table(folder, bytes(data))
        rows = list(read.rows())
        assert sum(len(batch[0]) for batch in read.batches(["a"])) == len(rows)
    except TableError as error:
        assert "\n" not in str(error)
