"""A server on loopback whose requests can be made to fail, and its side of HTTP."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD /path" matches.

    Args:
        status: answer with it; None = drop the connection after `after` bytes of the body.
        block: set an event and hold the request until the client is gone (to kill it in the middle).
    """

    pattern: str
    status: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    message: str = "injected"
    times: int = 1
    after: int = 0
    block: threading.Event | None = None


class FaultyServer(ThreadingHTTPServer):
    """A server that counts requests; `with` starts and stops it."""

    daemon_threads = True

    def __init__(self, handler: type[FaultyHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.lock = threading.RLock()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is what some tests are about."""

    def count(self, pattern: str) -> int:
        """Return how many requests so far match."""
        return sum(bool(re.search(pattern, line)) for line in self.seen)

    def fault(self, line: str) -> Fault | None:
        """Return the fault that is due for a request."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class FaultyHandler(BaseHTTPRequestHandler):
    """One connection: finds the method of a request, and lets the fault happen that is due.

    Attributes:
        routes: HTTP methods, pattern of the path, name of the method.
    """

    routes: ClassVar[list[tuple[str, str, str]]] = []

    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        path = unquote(split.path)
        line = f"{self.command} {path}"
        self.server.seen.append(line)
        self.broken: Fault | None = self.server.fault(line)
        if self.broken is not None and self.broken.status is None and self.command in ("PUT", "POST"):
            self.rfile.read(self.broken.after)
            self._drop()
            return
        body = self._body()
        if self.broken is not None and self.broken.status is not None:
            self._error(self.broken.status, self.broken.message, headers=self.broken.headers)
            return
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                with self.server.lock:
                    answer = getattr(self, name)(body, *match.groups())
                if answer is not None:
                    self._json(200, answer)
                return
        self._error(404, "no such route", "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _drop(self) -> None:
        if self.broken is not None and self.broken.block is not None:
            self.broken.block.set()
            self.connection.settimeout(30)
            while self.connection.recv(1 << 16):
                pass
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.broken is not None and self.broken.status is None and status in (200, 206):
            self.wfile.write(body[: self.broken.after])
            self.wfile.flush()
            self._drop()
            return
        self.wfile.write(body)

    def _json(self, status: int, data: Any) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Message": message, "Content-Type": "application/json", **(headers or {})}
        if code:
            extra["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), extra)

    def _ranged(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._send(200, data, headers)
            return
        begin, end = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        span = f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"
        self._send(206, data[begin:end], {**headers, "Content-Range": span})
