"""What a run rests on is tried in its place before the run starts: cheaply, without a trace, and told in one line."""

from __future__ import annotations

import errno
import os

import pytest

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.storage import StorageConfig
from cpcscale.storage.place import check_place


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left(folder: str) -> list[str]:
    """The files there; the server of the tests keeps an empty folder for a while."""
    return storage.list_files(folder) if storage.exists(folder) else []


def test_a_start_takes_two_requests_of_a_store_and_the_next_one_takes_one(faulty_s3):
    folder = storage.join(faulty_s3.base, "run", "ledger")
    for requests in (2, 1, 1):
        sent = faulty_s3.requests.total()
        tried = check_place(folder, briefly=True)
        assert faulty_s3.requests.total() - sent == requests
        assert tried.locks and tried.clock_s is not None and abs(tried.clock_s) < 30
    assert storage.list_files(folder) == ["place-check"]


@pytest.mark.parametrize("place", ["local", "store"])
def test_a_place_that_does_everything_is_left_as_it_was(place, tmp_path, request):
    folder = str(tmp_path / "new" / "run") if place == "local" else request.getfixturevalue("faulty_s3").base
    for briefly in (False, True) if place == "local" else (False,):
        tried = check_place(folder, briefly=briefly)
        assert tried.locks and tried.seconds > 0
        assert (tried.clock_s is None) == (place == "local")
        assert left(folder) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("briefly", [True, False])
def test_a_store_that_ignores_the_condition_is_refused_by_each_of_four_drivers(faulty_s3, briefly):
    folder = storage.join(faulty_s3.base, "run", "ledger")
    faulty_s3.fail("overwrites", method="PUT")
    for _ in range(4):
        told = refusal(lambda: check_place(folder, briefly=briefly))
        assert folder in told and "If-None-Match" in told and "run_dir" in told
        assert left(folder) == []


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "NotImplemented")])
def test_a_store_without_conditional_writes_is_told_as_that_and_at_once(faulty_s3, status, code):
    fault = faulty_s3.fail("status", status=status, code=code, method="PUT")
    told = refusal(lambda: check_place(faulty_s3.base, briefly=True))
    assert "conditional writes" in told and "run_dir" in told and "AWS_ACCESS_KEY_ID" not in told
    assert fault.struck == 1


def test_a_store_that_lists_late_is_told(faulty_s3):
    empty = b"<?xml version='1.0'?><ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
    faulty_s3.fail("reply", status=200, body=empty, method="GET", path="list-type", times=1)
    told = refusal(lambda: check_place(faulty_s3.base))
    assert "not listed" in told
    assert left(faulty_s3.base) == []


def test_keys_and_outages_at_the_start_are_told_by_the_store(faulty_s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage.configure(StorageConfig())
    assert "SignatureDoesNotMatch" in refusal(lambda: check_place(faulty_s3.base, briefly=True))


def test_a_disk_without_hard_links_is_told_as_that_not_as_one_without_permission(tmp_path, monkeypatch):
    def link(*_: object) -> None:  # As Linux does on FAT.
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    told = refusal(lambda: check_place(str(tmp_path / "run"), briefly=True))
    assert "hard links" in told and "run_dir" in told and "denied" not in told
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_is_tried_and_not_refused(tmp_path, monkeypatch):
    import fcntl

    def flock(*_: object) -> None:  # As Lustre does without its option.
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not check_place(str(tmp_path)).locks
