"""Requests to an object store: retried within limits, and counted.

s3fs, botocore and aiobotocore are not imported here: `cpcscale.storage` imports them and passes objects and errors in.
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
from cpcscale.storage.refusals import clock_s, is_page, lasts, reply_of, status_and_code

T = TypeVar("T")
Errors = tuple[type[Exception], ...]

log = logging.getLogger(__name__)

# A slower connection counts as hung: the bytes of a request add to its time limit at this rate.
SLOWEST_BYTES_PER_S = 256 * 2**10
_WARN_AFTER_S = 5.0
# The last try gets at least this long, else it could only report that it had no time.
_LEAST_S = 1.0
# Codes that a retry may cure, whatever their status: throttling, a body damaged on its way, colliding writes.
_TRANSIENT_CODES = re.compile(
    "SlowDown|Throttl.*|RequestLimitExceeded|TooManyRequests.*|InternalError|ServiceUnavailable|RequestTimeout.*"
    "|BadDigest|IncompleteBody|XAmzContentSHA256Mismatch|OperationAborted|ConditionalRequestConflict"
)
# HEAD requests, and what asks for the same with a body in the reply.
_ASKED_AGAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "head_object": ("get_object", {"Range": "bytes=0-0"}),
    "head_bucket": ("list_objects_v2", {"MaxKeys": 1}),
}
# Errors of TLS that a retry does not cure: an invalid certificate, a server without TLS.
_NO_TLS = re.compile("CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER")
# Has no state that forked processes would share, and leaves the global generator alone.
_jitter = random.SystemRandom()


@dataclass(kw_only=True)
class StorageConfig:
    """How long an object store may take. Local files have no limits."""

    # Seconds to wait for one connection.
    connect_timeout_s: float = 5.0
    # Seconds that one try of a request may take; each MiB of data adds 4 s.
    request_timeout_s: float = 30.0
    # Seconds after the first try of a request in which a retry may start; then the operation fails.
    total_timeout_s: float = 120.0
    # The pause after the nth failed try is drawn between 0 and this times 2^n seconds.
    backoff_base_s: float = 0.2
    # The longest pause in seconds.
    backoff_cap_s: float = 8.0

    def __post_init__(self) -> None:
        values = {f"storage.{name}": value for name, value in dataclasses.asdict(self).items()}
        config.at_least(0.01, **values)


@dataclass(frozen=True)
class TrafficCounts:
    """Traffic of this process with object stores; `later - earlier` is what happened in between."""

    # HTTP requests, sent or attempted, with all retries.
    requests: int = 0
    # Tries after the first of each request.
    retries: int = 0
    # Bytes of objects received whole; listings and failed tries do not count.
    bytes_read: int = 0
    # Bytes of objects that the store accepted.
    bytes_written: int = 0
    # Seconds in requests, summed over those at the same time, without the pauses between tries.
    seconds: float = 0.0

    def __add__(self, other: TrafficCounts) -> TrafficCounts:
        return TrafficCounts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __sub__(self, earlier: TrafficCounts) -> TrafficCounts:
        return TrafficCounts(*(getattr(self, name) - getattr(earlier, name) for name in self.__dataclass_fields__))


class TrafficTotals:
    """Sums the counts of all threads of a process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Sets the counts to zero and makes a new lock, as a forked process needs."""
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
    """A subclass of aiobotocore's HTTP session that counts each request and never sends one twice."""

    class Session(session_class):
        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)
            # aiohttp repeats a PUT when a connection breaks: a conditional one could then fail because of itself.
            session._retry_connection = False
            return session

        async def send(self, request: Any) -> Any:
            TRAFFIC.add(requests=1)
            response = await super().send(request)
            if _is_lost(request.method, response):
                response.status_code = 400
            return response

    return Session


class GaveUpError(Exception):
    """Raised when every try of a request failed. Not an OSError, which s3fs would take for a missing object."""

    def __init__(self, number: int, seconds: float, last: Exception) -> None:
        tries = "1 try" if number == 1 else f"{number} tries"
        super().__init__(
            f"{tries} over {seconds:.0f} s failed (the last with {type(last).__name__}: {str(last)[:300]})"
        )


class ShortReadError(OSError):
    """Raised for a reply with fewer bytes than the range that was byte_range for."""


async def retry(
    attempt: Callable[[int, float], Awaitable[T]], transient: Errors, settings: StorageConfig, what: str
) -> T:
    """The result of the first `attempt(number from 1, seconds it may take)` that succeeds; `what` is for a warning.

    An OSError, or one of `transient`, that a retry may cure is followed by one, after a pause with full jitter; any
    other error is raised at once. Raises GaveUpError when the next try would start more than `total_timeout_s` after
    the first.
    """
    errors: Errors = (OSError, *transient)
    started, warned, number = time.monotonic(), False, 1
    while True:
        left_s = settings.total_timeout_s - (time.monotonic() - started)
        tried = time.monotonic()
        try:
            return await attempt(number, min(settings.request_timeout_s, max(left_s, _LEAST_S)))
        except errors as error:
            if not is_transient(error, transient):
                raise
            now = time.monotonic()
            pause_s = _jitter.uniform(0, min(settings.backoff_cap_s, settings.backoff_base_s * 2 ** min(number, 60)))
            if now - started + pause_s >= settings.total_timeout_s:
                raise GaveUpError(number, now - started, error) from error
            if not warned and now - started > _WARN_AFTER_S:
                warned = True
                why = config.redact(" ".join(f"{type(error).__name__}: {error}".split()))
                log.warning("%s: no good answer (%s), trying for up to %g s", what, why, settings.total_timeout_s)
        finally:
            TRAFFIC.add(seconds=time.monotonic() - tried)
        await asyncio.sleep(pause_s)
        TRAFFIC.add(retries=1)
        number += 1


def is_transient(error: Exception, transient: Errors) -> bool:
    """Whether a retry may help: a failed or broken connection, a time-out, 5xx, throttling, a truncated body."""
    status, code = status_and_code(error)
    if status:
        passes = status in (408, 429) or (status >= 500 and status not in (501, 507))
        return not lasts(code) and (passes or bool(_TRANSIENT_CODES.fullmatch(code)))
    if _NO_TLS.search(str(error)):
        return False
    return isinstance(error, (ConnectionError, TimeoutError, ShortReadError, *transient))


class FetchedBody:
    """A body in memory, where s3fs expects one that it must still read."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read(self) -> bytes:
        return self._data

    def close(self) -> None:
        """Does nothing: the connection is closed."""


class Requests:
    """Replaces `_call_s3` of an s3fs file system, which sends all its requests.

    Each request is retried by itself (a page of a listing, a part of an upload, an object with its body), so a long
    operation does not start again after one failure. `filesystem` must be set to one try, with the time-outs of
    `settings`.
    """

    def __init__(self, filesystem: Any, transient: Errors, settings: StorageConfig) -> None:
        self._call, self._connect = filesystem._call_s3, filesystem.set_session
        self._transient, self._settings = transient, settings
        self.clock_s: float | None = None
        """Seconds by which this machine's clock was ahead of the store's in its last reply."""

    async def __call__(self, method: str, *defaults: Any, **request: Any) -> Any:
        """The reply to the request, with its body in memory. Raises GaveUpError, or the store's error."""
        if method == "abort_multipart_upload":
            return await self._abort_upload(method, *defaults, **request)
        # May take over a second on a busy machine, and is not part of the time of a request.
        await self._connect()
        number = 1

        async def attempt(now: int, limit_s: float) -> Any:
            nonlocal number
            number = now
            return await self._try(limit_s, method, *defaults, **request)

        what = "/".join(["s3:/", *(request[part] for part in ("Bucket", "Key", "Prefix") if request.get(part))])
        try:
            reply = await retry(attempt, self._transient, self._settings, what)
        except OSError as error:
            if method in _ASKED_AGAIN:
                refusal = await self._worded(error, method, **request)
                raise refusal from refusal.__cause__
            # An earlier try may have written the object, and only its reply was lost.
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
        """The bytes [start, stop) of an object; the store replies with status 412 if its etag is another one."""
        only = {"IfMatch": etag} if etag else {}
        reply = await self("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **only)
        return bytes(await reply["Body"].read())

    async def _worded(self, error: OSError, method: str, **request: Any) -> OSError:
        """The refusal `error` of a HEAD, whose reply has no body, as the store words it in reply to a GET."""
        if status_and_code(error)[0] in (0, 404, 412):
            return error
        again, only = _ASKED_AGAIN[method]
        try:
            await self._try(self._settings.request_timeout_s, again, **request, **only)
        except OSError as worded:
            if status_and_code(worded)[0]:
                return worded
        except self._transient:
            pass
        return error

    async def _try(self, limit_s: float, method: str, *defaults: Any, **request: Any) -> Any:
        # A store takes a time to join parts that grows with their number.
        carried_s = len(request.get("Body", b"")) / SLOWEST_BYTES_PER_S
        carried_s += len(request.get("MultipartUpload", {}).get("Parts", ()))
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(limit_s + carried_s) as bound:
                try:
                    reply = await self._call(method, *defaults, **request)
                except OSError as error:
                    self._see_clock(reply_of(error))
                    raise
                self._see_clock(reply)
                _check_object(method, reply)
                if method == "get_object":
                    bound.reschedule(clock() + limit_s + reply["ContentLength"] / SLOWEST_BYTES_PER_S)
                    reply["Body"] = FetchedBody(await _read_body(reply, request.get("Range", "")))
                return reply
        except TimeoutError as error:
            if bound.expired():
                raise TimeoutError(f"no whole answer within {limit_s:.3g} s") from error
            raise

    def _see_clock(self, reply: dict[str, Any]) -> None:
        self.clock_s = clock_s(reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", ""))

    async def _abort_upload(self, method: str, *defaults: Any, **request: Any) -> None:
        """Removes the parts of a failed upload, in one try; errors are ignored, for that of the upload is reported."""
        with contextlib.suppress(OSError, *self._transient):
            await self._try(self._settings.connect_timeout_s, method, *defaults, **request)


def _is_lost(method: str, response: Any) -> bool:
    """Whether a reply that botocore would follow or take for a good one leads nowhere."""
    headers = response.headers
    if method == "HEAD" and response.status_code in (301, 302, 307, 308):
        # botocore asks for the region of the bucket by another HEAD, which is redirected as well, without end.
        return "x-amz-bucket-region" not in headers
    return response.status_code == 200 and is_page(headers.get("content-type", "")) and "etag" not in headers


def _check_object(method: str, reply: dict[str, Any]) -> None:
    """Raises ShortReadError for a reply that is not of an object, as of an error with the status 200."""
    headers = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    error = "etag" not in headers and "xml" in headers.get("content-type", "")
    if (method == "get_object" and error) or (method == "head_object" and "ContentLength" not in reply):
        if "Body" in reply:
            reply["Body"].close()
        raise ShortReadError("the reply is not that of an object: it is XML without an ETag, or has no size")


def already_there(error: OSError) -> bool:
    """Whether a conditional write was refused because the object exists."""
    return isinstance(error, FileExistsError) or status_and_code(error)[0] == 412


async def _read_body(reply: dict[str, Any], byte_range: str) -> bytes:
    """The body of `reply` to a request for `byte_range` (`bytes=first-last`); ShortReadError if bytes are missing."""
    try:
        data: bytes = await reply["Body"].read()
    finally:
        reply["Body"].close()
    if not byte_range or byte_range.startswith("bytes=-"):
        return data
    first, _, last = byte_range.removeprefix("bytes=").partition("-")
    covered, _, total = reply.get("ContentRange", "").removeprefix("bytes ").partition("/")
    if not covered:  # A server may ignore the range and send all.
        return data[int(first) : int(last) + 1 if last else None]
    if total.isdigit():
        expected = min(int(last) + 1 if last else int(total), int(total)) - int(first)
        if len(data) != expected or not covered.startswith(f"{first}-"):
            raise ShortReadError(f"{len(data)} bytes ({covered}) came for {byte_range} of an object of {total}")
    return data


def upload(put: Callable[[], object]) -> None:
    """Runs `put`, and once more when the reply to the last request of an upload in parts was lost.

    The retried request then finds no such upload, and it is unknown whether the old or the new object is there.
    """
    try:
        put()
    except FileNotFoundError as error:
        if status_and_code(error)[1] != "NoSuchUpload":
            raise
        put()
