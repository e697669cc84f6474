"""A proxy in front of a real S3 server that fails as told, and counts what goes through it.

It speaks HTTP/1.1 with kept connections and hands on method, path, query and headers, Host among them, unchanged, so
that signatures stay valid. A fault is switched on for the next n requests that match it, or for a share of them:

    store.fail("unavailable", times=3, method="GET")     # the next three
    store.fail("cut", share=0.3, path="shard-")          # each with this probability, drawn from a fixed seed
    store.down(2.0)                                      # refuses connections, those that stand are reset
    store.heal()                                         # no fault any more
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

KINDS = {
    "unavailable": "503 SlowDown, not handed on",
    "status": "a refusal with `status` and `code`, not handed on; as a store words it, without a body to a HEAD",
    "reply": "`body` of the type `content` with `status`, not handed on",
    "overwrites": "a conditional write that the server refuses is answered as one that was done",
    "reset": "connection reset, not handed on",
    "lost_answer": "handed on, then reset before a byte of the answer",
    "reset_in_body": "reset in the middle of the body",
    "cut": "connection closed in the middle of the body",
    "short": "a whole answer that carries only half of the range it was asked for",
    "flip": "one byte of the body changed",
    "delay": "`seconds` late",
    "hang": "read, and never answered",
}
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


@dataclass
class Fault:
    """What goes wrong (one of KINDS), and for which requests."""

    kind: str
    times: int | None
    share: float
    method: str
    path: str
    seconds: float
    status: int
    code: str
    body: bytes
    content: str
    date: str
    struck: int = 0
    """Requests it has hit."""
    draws: random.Random = field(default_factory=lambda: random.Random(7))

    def strikes(self, method: str, path: str) -> bool:
        """Whether it hits this request; counts it when it does."""
        if self.method not in ("", method) or self.path not in path or self.struck == self.times:
            return False
        hit = self.draws.random() < self.share
        self.struck += hit
        return hit


class FaultyStore:
    """The running proxy. `requests`, `received_bytes` and `sent_bytes` (bodies) are counted by method."""

    def __init__(self, upstream: str, base: str) -> None:
        self.base = base
        self.upstream = urlsplit(upstream).netloc
        self.requests: Counter[str] = Counter()
        self.received_bytes: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.released = threading.Event()
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._connections: set[socket.socket] = set()
        self._timers: list[threading.Timer] = []
        self._server = self._listen(0)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fail(
        self,
        kind: str,
        times: int | None = None,
        share: float = 1.0,
        method: str = "",
        path: str = "",
        seconds: float = 0.0,
        status: int = 503,
        code: str = "SlowDown",
        body: bytes = b"",
        content: str = "application/xml",
        date: str = "",
    ) -> Fault:
        """Switches a fault on for requests of `method` whose path and query hold `path`; says how often it struck."""
        assert kind in KINDS
        fault = Fault(kind, times, share, method, path, seconds, status, code, body, content, date)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Switches all faults off and lets go of the requests that hang."""
        with self._lock:
            self._faults.clear()
        self.released.set()
        self.released = threading.Event()

    def down(self, seconds: float) -> None:
        """Refuses connections for so long; those that stand are reset now."""
        self._shut()
        timer = threading.Timer(seconds, self._up)
        self._timers.append(timer)
        timer.start()

    def close(self) -> None:
        """Ends the proxy and its threads."""
        for timer in self._timers:
            timer.cancel()
            timer.join()
        self.heal()
        self._shut()

    def fault(self, method: str, path: str, body_bytes: int) -> Fault | None:
        """The fault for a request that has come, which is counted."""
        with self._lock:
            self.requests[method] += 1
            self.received_bytes[method] += body_bytes
            return next((fault for fault in self._faults if fault.strikes(method, unquote(path))), None)

    def sent(self, method: str, body_bytes: int) -> None:
        with self._lock:
            self.sent_bytes[method] += body_bytes

    @contextlib.contextmanager
    def connected(self, connection: socket.socket) -> Iterator[None]:
        """Knows a client's connection, so that `down` can reset it."""
        with self._lock:
            self._connections.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _listen(self, port: int) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"store": self})
        server = _Server(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def _up(self) -> None:
        self._server = self._listen(int(self.url.rpartition(":")[2]))

    def _shut(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            standing = list(self._connections)
        for connection in standing:
            _reset(connection)


@contextlib.contextmanager
def in_front_of(upstream: str, base: str) -> Iterator[FaultyStore]:
    """A healthy proxy for the server at `upstream`, on a free port."""
    store = FaultyStore(upstream, base)
    try:
        yield store
    finally:
        store.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away, or that was sent away, is what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: FaultyStore

    def handle(self) -> None:
        with self.store.connected(self.connection):
            super().handle()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.store.fault(self.command, self.path, len(body))
        kind = fault.kind if fault else ""
        if fault:
            time.sleep(fault.seconds)
        match kind:
            case "hang":
                self.store.released.wait(60)
                return self._leave()
            case "reset":
                return self._leave()
            case "unavailable" | "status":
                assert fault
                text = f"<Error><Code>{fault.code}</Code><Message>by request</Message></Error>".encode()
                return self._send(fault.status, "Told So", _headers("application/xml", fault.date), text)
            case "reply":
                assert fault
                return self._send(fault.status, "Told So", _headers(fault.content, fault.date), fault.body)
        status, reason, headers, answer = self._upstream_answer(body)
        if kind == "overwrites" and status == 412:
            status, reason, headers, answer = 200, "OK", [("ETag", '"0"')], b""
        if kind == "lost_answer":
            return self._leave()
        if kind == "flip" and answer:
            middle = len(answer) // 2
            answer = answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :]
        if kind == "short":
            answer = answer[: len(answer) // 2]
        cut = len(answer) // 2 if kind in ("reset_in_body", "cut") else None
        self._send(status, reason, headers, answer, cut)
        if kind == "reset_in_body":
            self._leave()
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def _upstream_answer(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        assert "Transfer-Encoding" not in self.headers
        # A connection for each request: a kept one that the server closes would be a fault that nobody asked for.
        with contextlib.closing(http.client.HTTPConnection(self.store.upstream, timeout=60)) as upstream:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            data = response.read()
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP]
        if self.command == "HEAD":
            kept.append(("Content-Length", response.headers.get("Content-Length", "0")))
        return response.status, response.reason, kept, data

    def _send(
        self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, cut: int | None = None
    ) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        if self.command == "HEAD":
            body = b""
        elif status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()
        self.store.sent(self.command, len(body[:cut]))
        if cut is not None:
            self.close_connection = True

    def _leave(self) -> None:
        _reset(self.connection)
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """The counters are the log."""


def _headers(kind: str, date: str) -> list[tuple[str, str]]:
    return [("Content-Type", kind), *([("Date", date)] if date else [])]


def _reset(connection: socket.socket) -> None:
    """Closes with RST: the other side sees a reset, not an end."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Wakes a thread that waits to read; `detach`, because `close` would wait for the files made of the socket.
        connection.shutdown(socket.SHUT_RD)
        os.close(connection.detach())
