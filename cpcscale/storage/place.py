"""Tries what runs rest on in a folder or store: writes, reads, listing, creating a file once, locks, the clock."""

from __future__ import annotations

import contextlib
import time
import uuid
from dataclasses import dataclass

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.storage.local_files import ELSEWHERE
from cpcscale.storage.locks import lock


@dataclass(frozen=True)
class Place:
    """What a place was seen to do, in `seconds`.

    `clock_s`: by how many seconds this machine's clock is ahead of the store's, to about a second; None for a folder.
    `locks`: whether files can be locked (flock), which caches on a disk need.
    """

    seconds: float
    clock_s: float | None
    locks: bool


def check_place(folder: str, *, briefly: bool = False) -> Place:
    """Tries `folder` (path or s3://), which need not exist, by a file that is removed again.

    With `briefly`, a store gets two requests at most, which show that it replaces nothing that it shall not. The object
    `place-check` stays, so that the next call makes one request. Raises UserError for what a run needs and the place
    does not do.
    """
    started, local = time.monotonic(), storage.local_path(folder)
    while local and not storage.exists(str(local)):
        local = local.parent
    stays = briefly and local is None
    url = storage.join(str(local or folder), "place-check" if stays else f"place-check-{uuid.uuid4().hex}")
    created = storage.create(url, _data())
    try:
        if created and storage.create(url, _data()):
            stays = False
            raise UserError(
                f"{folder}: the store replaces an object that it was asked to create only if there is none "
                f"(If-None-Match), so that two drivers could take one run: {ELSEWHERE}"
            )
        if not briefly:
            _check_reading(url)
        with storage.opened(url) if local else contextlib.nullcontext() as file:
            locks = file is None or lock(file.fileno(), wait=False) is not None
    finally:
        if not stays:
            storage.remove(url)
    return Place(time.monotonic() - started, storage.clock_s(url), locks)


def _data() -> bytes:
    # Each time another: equal bytes would count as written by the same call.
    return f"cpcscale tries this place, {uuid.uuid4().hex}\n".encode()


def _check_reading(url: str) -> None:
    """Raises UserError unless a file is read as it was written last, and listed."""
    folder, _, name = url.rpartition("/")
    data = _data()
    storage.write(url, data)
    if storage.read(url) != data:
        raise UserError(f"{folder}: what is written there is read otherwise: use another disk or store")
    if name not in storage.list_files(folder):
        raise UserError(f"{folder}: what is written there is not listed at once: use another disk or store")
