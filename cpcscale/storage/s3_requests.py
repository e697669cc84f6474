"""The requests of storage.py to an object store: tried until they are through, within limits, and counted.

The libraries are known here by the shape of their calls and errors only; storage.py, their door, hands them in.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cpcscale import config

T = TypeVar("T")
Errors = tuple[type[Exception], ...]

log = logging.getLogger(__name__)

# A line that moves less is a line that hangs: what a request carries adds to its time at this rate.
SLOWEST_BYTES_PER_S = 256 * 2**10
_SAY_AFTER_S = 5.0
# The last try before the end gets this much, or it would only tell that it had no time.
_LEAST_S = 1.0
# Refusals that pass, whatever their status: throttling, a body damaged on its way up, two conditional writes that met.
_PASSING_CODES = re.compile(
    "SlowDown|Throttl.*|RequestLimitExceeded|TooManyRequests.*|InternalError|ServiceUnavailable|RequestTimeout.*"
    "|BadDigest|IncompleteBody|XAmzContentSHA256Mismatch|OperationAborted|ConditionalRequestConflict"
)
# A certificate that does not hold, and a server that speaks no TLS, will not in a second.
_NO_TLS = re.compile("CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER")
# No state to share over a fork, and the global generator's sequence belongs to others.
_jitter = random.SystemRandom()


@dataclass(kw_only=True)
class StorageConfig:
    """How long an object store may take. Local files have no limits."""

    connect_timeout_s: float = 5.0
    """Seconds for one connection to stand."""
    request_timeout_s: float = 30.0
    """Seconds one try of a request may take; what it carries adds 4 s a MiB."""
    total_timeout_s: float = 120.0
    """Seconds from the first try of a request in which another may start; then the operation fails."""
    backoff_base_s: float = 0.2
    """The pause after the nth failed try is drawn between 0 and this x 2^n seconds..."""
    backoff_cap_s: float = 8.0
    """...but never longer than this."""

    def __post_init__(self) -> None:
        values = {f"storage.{name}": value for name, value in dataclasses.asdict(self).items()}
        config.at_least(0.01, **values)


@dataclass(frozen=True)
class TrafficCounts:
    """What went to and from object stores in this process; `later - earlier` is what happened between."""

    requests: int = 0
    """HTTP requests sent or tried to send, the retried ones among them."""
    retries: int = 0
    """Tries after the first of a request."""
    bytes_read: int = 0
    """Bytes of objects that arrived whole (not listings, not what a failed try brought)."""
    bytes_written: int = 0
    """Bytes of objects that the store took."""
    seconds: float = 0.0
    """Seconds in tries, added up over requests at the same time; pauses between tries are not in it."""

    def __add__(self, other: TrafficCounts) -> TrafficCounts:
        return TrafficCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __sub__(self, earlier: TrafficCounts) -> TrafficCounts:
        return TrafficCounts(*(getattr(self, name) - getattr(earlier, name) for name in self.__dataclass_fields__))


class TrafficTotals:
    """Counts from many threads."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts at zero with a lock of its own, as a forked process must."""
        self._lock, self._now = threading.Lock(), TrafficCounts()

    def add(self, **more: float) -> None:
        with self._lock:
            self._now = dataclasses.replace(
                self._now, **{name: getattr(self._now, name) + value for name, value in more.items()}
            )

    def now(self) -> TrafficCounts:
        return self._now


TRAFFIC = TrafficTotals()
os.register_at_fork(after_in_child=TRAFFIC.reset)


def counting_session(session_class: Any) -> Any:
    """aiobotocore's HTTP session `session_class`, made to count each request and to send none twice."""

    class Session(session_class):
        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)
            # aiohttp sends a PUT once more when a connection breaks: a conditional one would lose against itself.
            session._retry_connection = False
            return session

        async def send(self, request: Any) -> Any:
            TRAFFIC.add(requests=1)
            return await super().send(request)

    return Session


class GaveUpError(Exception):
    """No try of a request got through in the time there was; no OSError, which s3fs takes for an absent object."""

    def __init__(self, number: int, seconds: float, last: Exception) -> None:
        tries = "1 try" if number == 1 else f"{number} tries"
        super().__init__(f"{tries} over {seconds:.0f} s failed (the last with {type(last).__name__}: {last})")


class ShortReadError(OSError):
    """A range that came with fewer bytes than it names."""


async def retry(
    attempt: Callable[[int, float], Awaitable[T]], passing: Errors, settings: StorageConfig, what: str
) -> T:
    """The result of the first `attempt(number from 1, seconds it may take)` that raises nothing.

    An error of OSError or `passing` that another try may cure is followed by one, with full jitter; any other is raised
    at once. Raises GaveUpError when the next try would start `total_timeout_s` after the first or later.
    """
    errors: Errors = (OSError, *passing)
    began, said, number = time.monotonic(), False, 1
    while True:
        left_s = settings.total_timeout_s - (time.monotonic() - began)
        tried = time.monotonic()
        try:
            return await attempt(number, min(settings.request_timeout_s, max(left_s, _LEAST_S)))
        except errors as error:
            if not is_transient(error, passing):
                raise
            now = time.monotonic()
            pause_s = _jitter.uniform(0, min(settings.backoff_cap_s, settings.backoff_base_s * 2 ** min(number, 60)))
            if now - began + pause_s >= settings.total_timeout_s:
                raise GaveUpError(number, now - began, error) from error
            if not said and now - began > _SAY_AFTER_S:
                said = True
                why = config.redact(" ".join(f"{type(error).__name__}: {error}".split()))
                log.warning("%s: no good answer (%s), trying for up to %g s", what, why, settings.total_timeout_s)
        finally:
            TRAFFIC.add(seconds=time.monotonic() - tried)
        await asyncio.sleep(pause_s)
        TRAFFIC.add(retries=1)
        number += 1


def is_transient(error: Exception, passing: Errors) -> bool:
    """Whether another try may end otherwise: no or a broken connection, silence, 5xx, throttling, a body cut short."""
    status, code = error_reply(error)
    if status:
        return status in (408, 429) or (status >= 500 and status != 501) or bool(_PASSING_CODES.fullmatch(code))
    if _NO_TLS.search(str(error)):
        return False
    return isinstance(error, (ConnectionError, TimeoutError, ShortReadError, *passing))


def error_reply(error: BaseException) -> tuple[int, str]:
    """(HTTP status, the store's code) of what a store refused, (0, "") for an error that is no answer of a store."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
    return 0, ""


class FetchedBody:
    """A body that has arrived, where s3fs expects one to be read."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self) -> bytes:
        return self._data

    def close(self) -> None:
        """Nothing is open any more."""


class Requests:
    """Stands in for the `_call_s3` of an s3fs file system, through which all its requests go.

    Each is tried by itself (a page of a listing, a part of an upload, an object with its body), so a long operation
    does not begin anew for one bad answer. `filesystem` is set to one try, with `settings`' time-outs.
    """

    def __init__(self, filesystem: Any, passing: Errors, settings: StorageConfig) -> None:
        self._call, self._connect = filesystem._call_s3, filesystem.set_session
        self._passing, self._settings = passing, settings

    async def __call__(self, method: str, *defaults: Any, **request: Any) -> Any:
        """The reply to the request, its body in memory. Raises GaveUpError, or the store's refusal."""
        if method == "abort_multipart_upload":
            return await self._tidy(method, *defaults, **request)
        # Work of this machine, a second and more on a busy one: no part of a request's time.
        await self._connect()
        number = 1

        async def attempt(now: int, limit_s: float) -> Any:
            nonlocal number
            number = now
            return await self._try(limit_s, method, *defaults, **request)

        what = "/".join(["s3:/", *(request[part] for part in ("Bucket", "Key", "Prefix") if request.get(part))])
        try:
            reply = await retry(attempt, self._passing, self._settings, what)
        except OSError as error:
            # The try before may have written the object and only its answer was lost.
            if number == 1 or "IfNoneMatch" not in request or not already_there(error):
                raise
            there = await self("get_object", Bucket=request["Bucket"], Key=request["Key"])
            if await there["Body"].read() != request.get("Body"):
                raise
            return {}
        TRAFFIC.add(bytes_written=len(request.get("Body", b"")))
        if method == "get_object":
            TRAFFIC.add(bytes_read=len(await reply["Body"].read()))
        return reply

    async def get(self, bucket: str, key: str, start: int, stop: int, etag: str) -> bytes:
        """The bytes [start, stop) of the object with this etag; another one is refused with status 412."""
        only = {"IfMatch": etag} if etag else {}
        reply = await self("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **only)
        return bytes(await reply["Body"].read())

    async def _try(self, limit_s: float, method: str, *defaults: Any, **request: Any) -> Any:
        # Joining parts takes a store time that grows with their number.
        carried_s = len(request.get("Body", b"")) / SLOWEST_BYTES_PER_S
        carried_s += len(request.get("MultipartUpload", {}).get("Parts", ()))
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(limit_s + carried_s) as bound:
                reply = await self._call(method, *defaults, **request)
                if method == "get_object":
                    bound.reschedule(clock() + limit_s + reply["ContentLength"] / SLOWEST_BYTES_PER_S)
                    reply["Body"] = FetchedBody(await _arrived(reply, request.get("Range", "")))
                return reply
        except TimeoutError as error:
            if bound.expired():
                raise TimeoutError(f"no whole answer within {limit_s:.3g} s") from error
            raise

    async def _tidy(self, method: str, *defaults: Any, **request: Any) -> None:
        """One try to remove what a failed upload left: the error to report is the one that made it fail."""
        with contextlib.suppress(OSError, *self._passing):
            await self._try(self._settings.connect_timeout_s, method, *defaults, **request)


def already_there(error: OSError) -> bool:
    """Whether a conditional write was refused because something stands at its place."""
    return isinstance(error, FileExistsError) or error_reply(error)[0] == 412


async def _arrived(reply: dict[str, Any], asked: str) -> bytes:
    """The body of `reply` to a request for the range `asked` (`bytes=first-last`), checked to be all of it."""
    try:
        data: bytes = await reply["Body"].read()
    finally:
        reply["Body"].close()
    if not asked or asked.startswith("bytes=-"):
        return data
    first, _, last = asked.removeprefix("bytes=").partition("-")
    covered, _, total = reply.get("ContentRange", "").removeprefix("bytes ").partition("/")
    if not covered:  # A server may ignore a range and send all.
        return data[int(first) : int(last) + 1 if last else None]
    if total.isdigit():
        expected = min(int(last) + 1 if last else int(total), int(total)) - int(first)
        if len(data) != expected or not covered.startswith(f"{first}-"):
            raise ShortReadError(f"{len(data)} bytes ({covered}) came for {asked} of an object of {total}")
    return data


def upload(put: Callable[[], object]) -> None:
    """Runs `put`. When the answer to the last request of an upload in parts is lost, the next try finds no such upload,
    and nobody knows which of two objects stands: then once more."""
    try:
        put()
    except FileNotFoundError as error:
        if error_reply(error)[1] != "NoSuchUpload":
            raise
        put()
