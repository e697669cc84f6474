"""Promises of the storage door, on a local disk and on a real S3 server."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.dummy
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faulty_store
import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_store import ObjectStore

from cpcscale import storage
from cpcscale.errors import UserError

ODD_NAMES = [
    "plain",
    "with space.wav",
    "é ü 語.wav",
    "st*r",
    "star",
    "br[1]",
    "br1",
    "q?x=1",
    "h#x",
    "pct%20",
    "a+b",
    "c:d",
    "caf\u00e9",
    "cafe\u0301",
    "100%",
]


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, once on disk and once in the store."""
    if request.param == "local":
        return str(tmp_path / "store")
    return storage.join(request.getfixturevalue("s3").base, tmp_path.name)


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back_and_replaced_whole(base):
    url = storage.join(base, "deep", "er", "file")
    for data in (b"", b"short", bytes(range(256)) * 1000, b"short again"):
        storage.write(url, data)
        assert storage.read(url) == data
    assert storage.list_files(base) == ["deep/er/file"]


def test_a_ranged_read_gives_exactly_the_asked_bytes(base):
    data = bytes(range(256)) * 4
    storage.write(storage.join(base, "file"), data)

    @given(st.integers(0, 1023), st.integers(0, 2000))
    def check(start: int, count: int) -> None:
        assert storage.read(storage.join(base, "file"), start, start + count) == data[start : start + count]

    check()


def test_listing_is_relative_sorted_and_without_hidden_names(base):
    for name in ("b", "a/z", "a/b/c", "a/.hidden", ".git/config", "aa"):
        storage.write(storage.join(base, name), b"x")
    assert storage.list_files(base) == ["a/b/c", "a/z", "aa", "b"]
    assert storage.list_files(storage.join(base, "a")) == storage.list_files(storage.join(base, "a/")) == ["b/c", "z"]


def test_existence_is_that_of_files_and_folders(base):
    storage.write(storage.join(base, "folder", "file"), b"x")
    assert storage.exists(base)
    assert storage.exists(storage.join(base, "folder"))
    assert storage.exists(storage.join(base, "folder", "file"))
    assert not storage.exists(storage.join(base, "fold"))
    assert not storage.exists(storage.join(base, "folder", "other"))


def test_odd_names_are_names_and_removing_one_removes_no_other(base):
    for name in ODD_NAMES:
        storage.write(storage.join(base, name), name.encode())
    assert storage.list_files(base) == sorted(ODD_NAMES)
    for gone, name in enumerate(ODD_NAMES, start=1):
        assert storage.read(storage.join(base, name)) == name.encode()
        storage.remove(storage.join(base, name))
        left = sorted(ODD_NAMES[gone:])
        assert (storage.list_files(base) if left else []) == left


def test_a_folder_is_removed_whole_and_a_missing_one_silently(base):
    for name in ("gone/a", "gone/b/c", "gone2/a"):
        storage.write(storage.join(base, name), b"x")
    storage.remove(storage.join(base, "gone"))
    storage.remove(storage.join(base, "never"))
    assert storage.list_files(base) == ["gone2/a"]


def test_what_is_not_there_is_not_found_in_one_line(base):
    for action in (storage.read, storage.list_files):
        with pytest.raises(storage.NotFoundError) as caught:
            action(storage.join(base, "absent"))
        assert storage.join(base, "absent") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_nothing(base):
    url = storage.join(base, "file")
    storage.write(url, b"old")
    with pytest.raises(RuntimeError), storage.publishing(url) as aside:
        aside.write_bytes(b"half of the new")
        raise RuntimeError
    assert storage.read(url) == b"old"
    assert not aside.exists()
    with pytest.raises(RuntimeError), storage.publishing(storage.join(base, "fresh")) as aside:
        raise RuntimeError
    assert storage.list_files(base) == ["file"]
    if (local := storage.local_path(base)) is not None:
        assert [path.name for path in local.iterdir()] == ["file"]


def test_a_published_file_appears_only_when_its_block_ends(base):
    url = storage.join(base, "folder", "file")
    with storage.publishing(url) as aside:
        aside.write_bytes(b"all")
        assert not storage.exists(url)
        if storage.exists(base):
            assert storage.list_files(base) == []
    assert storage.read(url) == b"all"
    assert not aside.exists()


def test_a_size_is_that_of_a_file_and_a_folder_has_none(base):
    for name, data in (("x/empty", b""), ("x/file", bytes(1234))):
        storage.write(storage.join(base, name), data)
        assert storage.size(storage.join(base, name)) == len(data)
    for name in ("x", "absent"):
        with pytest.raises(storage.NotFoundError):
            storage.size(storage.join(base, name))


def test_what_stands_is_not_replaced_by_a_create(base):
    url = storage.join(base, "folder", "lease")
    assert storage.create(url, b"first")
    assert not storage.create(url, b"second")
    assert not storage.create(url, b"first")
    assert storage.read(url) == b"first"
    storage.remove(url)
    assert storage.create(url, b"third")
    if (local := storage.local_path(base)) is not None:
        assert [path.name for path in local.rglob("*")] == ["folder", "lease"]


def _contend(url: str, data: bytes, start, won) -> None:
    start.wait(60)
    won.put((data, storage.create(url, data)))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_of_many_that_create_at_once_exactly_one_wins_and_no_reader_sees_a_part(base, kind):
    context = multiprocessing.get_context("fork") if kind == "processes" else multiprocessing.dummy
    # The server takes seconds to settle a race over much data.
    turns, length = (5, 200_000) if storage.local_path(base) else (1, 100)
    for turn in range(turns):
        url = storage.join(base, f"lease-{turn}")
        start, won = context.Barrier(9), context.Queue()
        contenders = [context.Process(target=_contend, args=(url, b"%d" % n * length, start, won)) for n in range(8)]
        for contender in contenders:
            contender.start()
        start.wait(60)
        seen = [_read_or_none(url) for _ in range(20)]
        outcomes = [won.get(timeout=60) for _ in contenders]
        for contender in contenders:
            contender.join()
        (winner,) = [data for data, made in outcomes if made]
        assert storage.read(url) == winner
        assert set(seen) <= {None, winner}


def _read_or_none(url: str) -> bytes | None:
    try:
        return storage.read(url)
    except storage.NotFoundError:
        return None


def test_a_write_that_the_disk_refuses_leaves_nothing_and_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    refusal(lambda: storage.write(str(tmp_path / "file" / "below"), b"y"))
    refusal(lambda: storage.write(str(tmp_path / "folder"), b"y"))
    with pytest.raises(UserError), storage.publishing(str(tmp_path / "file" / "below" / "x")):
        pass
    with pytest.raises(UserError), storage.publishing(str(tmp_path / "folder")) as aside:
        aside.write_bytes(b"y")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "inner"]
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_reader_sees_the_old_file_or_the_new_and_never_a_part(tmp_path):
    url = str(tmp_path / "file")
    versions = [bytes([number]) * 3_000_000 for number in (1, 2)]
    storage.write(url, versions[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [storage.write(url, versions[turn % 2]) for turn in range(40)])
        while not writing.done():
            assert storage.read(url) in versions
        writing.result()


def test_a_disk_without_room_leaves_the_old_file_nothing_else_and_is_one_line(run_python, tmp_path):
    url = str(tmp_path / "folder" / "file")
    storage.write(url, b"old")
    text = f"""
import resource
from cpcscale import storage
from cpcscale.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def publish():
    with storage.publishing({url!r}) as aside:
        aside.write_bytes(bytes(5000))
for action in (lambda: storage.write({url!r}, bytes(5000)), publish):
    try:
        action()
    except UserError as error:
        print("REFUSED", repr(str(error)))
"""
    status, lines = run_python(text)
    assert (status, len(lines)) == (0, 2), lines
    assert all(line.startswith("REFUSED") and "\\n" not in line and url in line for line in lines)
    assert storage.read(url) == b"old"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_folders_made_for_nothing_go_again_and_others_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    for end, left in ((RuntimeError, ["mine"]), (KeyboardInterrupt, ["mine"]), (None, ["a", "b", "mine"])):
        with contextlib.suppress(RuntimeError, KeyboardInterrupt), storage.undoing_folders(str(tmp_path / "mine/a/b")):
            (tmp_path / "mine/a/b").mkdir(parents=True)
            if end:
                raise end
        assert sorted(path.name for path in tmp_path.rglob("*")) == left
    with pytest.raises(RuntimeError), storage.undoing_folders(str(tmp_path / "new/deep")):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "kept").write_bytes(b"someone else's")
        raise RuntimeError
    assert (tmp_path / "new" / "kept").exists()


def test_linked_folders_and_files_are_listed_and_a_circle_of_links_ends(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.wav").write_bytes(b"x")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "file.wav").symlink_to(tmp_path / "elsewhere" / "x.wav")
    (root / "sub" / "up").symlink_to(root)
    (root / "sub" / "self").symlink_to(".")
    (root / "broken.wav").symlink_to("nowhere")
    os.mkfifo(root / "pipe.wav")
    # A broken link is listed, so that whoever reads it says so; a named pipe, which would block a reader, is not.
    assert storage.list_files(str(root)) == ["broken.wav", "linked/x.wav", "sub/file.wav"]
    (tmp_path / "way-in").symlink_to(root)
    assert storage.list_files(str(tmp_path / "way-in")) == storage.list_files(str(root))


def test_a_folder_that_may_not_be_read_is_named_not_left_out():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "locked").mkdir(mode=0)
        user = os.geteuid()
        try:
            if user == 0:  # root may read everything
                os.seteuid(65534)
            assert "permissions" in refusal(lambda: storage.list_files(folder))
        finally:
            os.seteuid(user)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "pipe:echo hi > {marker}",
        "cmd:echo hi > {marker}",
        "pipe://echo hi > {marker}",
        "http://127.0.0.1:1/x",
        "gs://bucket/x",
        "memory://x",
        "simplecache::s3://bucket/x",
        "filecache::file:///etc/passwd",
        "S3A://bucket/x",
        "PIPE:echo hi > {marker}",
        "Cmd:echo hi > {marker}",
        "exec:touch {marker}",
        "data:,x",
        "gs:bucket/x",
        " pipe:echo hi > {marker}",
        "|echo hi > {marker}",
        "echo hi > {marker} |",
        "\tpipe:echo hi > {marker}\n",
        "s3://bucket/x ",
        "| s3://bucket/x",
        " ",
        "",
    ],
)
def test_commands_and_other_schemes_are_refused_in_one_line_and_never_run(url, tmp_path):
    marker = tmp_path / "ran"
    url = url.format(marker=marker)
    actions = [storage.read, storage.list_files, storage.exists, storage.remove, storage.size, storage.opened]
    actions += [lambda u: storage.write(u, b""), lambda u: storage.create(u, b""), lambda u: list(storage.chunks(u))]
    for action in actions:
        refusal(lambda action=action: action(url))
    with pytest.raises(UserError), storage.publishing(url):
        raise AssertionError("not reached")
    assert not marker.exists()


def test_credentials_in_a_url_are_refused_and_not_repeated():
    for url in ("s3://user:hunter2@bucket/x", "https://user:hunter2@host/x"):
        assert "hunter2" not in refusal(lambda url=url: storage.read(url))


def test_paths_are_made_absolute_and_parts_are_joined(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("a/b") == str(tmp_path / "a/b")
    assert storage.absolute("~/a") == "/home/someone/a"
    assert storage.join("s3://b/", "x", "y") == "s3://b/x/y"
    assert storage.join("/", "x") == "/x"
    assert storage.join("", "x") == "x"


def _read_into(queue, url: str) -> None:
    queue.put(storage.read(url))


def test_a_forked_process_can_read_the_store_its_parent_used(s3: ObjectStore):
    url = storage.join(s3.base, "forked")
    storage.write(url, b"x")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_into, args=(queue, url))
    child.start()
    assert queue.get(timeout=60) == b"x"
    child.join()


EVERY_ACTION = """
import sys
from cpcscale import storage
from cpcscale.errors import UserError
url = "s3://speech/conditions/x"
def publish():
    with storage.publishing(url) as aside:
        aside.write_bytes(b"x")
def write():
    storage.write(url, b"x")
for action in (storage.read, storage.list_files, storage.exists, storage.remove, write, publish):
    try:
        action(*[url][: action not in (write, publish)])
    except UserError as error:
        print("REFUSED", repr(str(error)))
"""


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "wrong"}, ("denied", "AWS_ACCESS_KEY_ID")),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, ("denied", "AWS_SECRET_ACCESS_KEY")),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, ("credentials", "AWS_ACCESS_KEY_ID")),
        ({"AWS_ENDPOINT_URL": "nonsense"}, ("nonsense", "AWS_ENDPOINT_URL")),
    ],
    ids=["key", "secret", "none", "endpoint"],
)
def test_every_action_on_a_store_that_refuses_is_one_line(run_python, tmp_path, environment, words):
    status, lines = run_python(EVERY_ACTION, HOME=str(tmp_path), **environment)
    assert (status, len(lines)) == (0, 6), lines
    for line in lines:
        assert line.startswith("REFUSED")
        assert "\\n" not in line
        assert all(word in line for word in words), line
    assert "test-secret" not in "".join(lines)


def test_a_server_that_is_not_there_is_one_line_in_its_time(run_python):
    text = "from cpcscale import storage\nstorage.configure(storage.StorageConfig(total_timeout_s=2))\n"
    text += 'storage.write("s3://speech/x", b"")'
    status, lines = run_python(text, AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert status == 1
    assert lines[-1].startswith("cpcscale.errors.UserError: s3://speech/x cannot be read or written")
    assert "127.0.0.1:1" in lines[-1]


def test_another_endpoint_is_another_store_without_a_word(s3: ObjectStore, monkeypatch, tmp_path):
    url = storage.join(s3.base, tmp_path.name)
    storage.write(url, b"x")
    with faulty_store.in_front_of(s3.environment["AWS_ENDPOINT_URL"], url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert storage.read(url) == b"x" and proxy.requests["GET"]
    monkeypatch.undo()
    # As after a bench, whose server has ended.
    assert storage.read(url) == b"x"


def test_a_process_that_used_the_store_ends(s3: ObjectStore):
    url = storage.join(s3.base, "ends")
    text = f"from cpcscale import storage\nstorage.write({url!r}, b'x')\nprint(storage.read({url!r}))"
    environment = {**os.environ, **s3.environment}
    process = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=60)
    assert process.stdout == "b'x'\n"
    assert process.returncode == 0
