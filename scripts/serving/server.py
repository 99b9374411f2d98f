"""Serve a saved model over HTTP, with the requests of text-embeddings-inference: /embed, /rerank, /predict.

    python scripts/serving/server.py MODEL --port 8080 --backend auto             # load, to_runtime
    python scripts/serving/server.py RUNTIME --port 8080 --workers 8              # what save_runtime wrote: mapped once
    curl 127.0.0.1:8080/embed -d '{"inputs": ["one text", "another"]}'
    curl 127.0.0.1:8080/rerank -d '{"query": "capital of France", "texts": ["Paris", "a cow"]}'  # words: ok
    curl 127.0.0.1:8080/predict -d '{"inputs": "a fine film"}'

An example in the standard library, and a way to measure (load.py): no batching of several requests, no TLS.
It listens on 127.0.0.1 unless told otherwise. Each request is computed by the thread that read it, in one thread of
torch, and at most `--callers` are computed at once. With `--workers`, several processes accept on one port.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_sparse.errors import SparsityError
from hf_sparse.runtime import backends, is_runtime
from scripts.serving.served_model import MOST_TEXTS, ROUTES, Model, RequestError

MOST_BYTES = 2_000_000
"""Of the body of a request, as in text-embeddings-inference."""


class Server(ThreadingHTTPServer):
    """An HTTP server around a model.

    Args:
        address: host and port; port 0 takes a free one.
        callers: requests that are computed at once.
        waiting: requests that may wait for these; more get status 429.
        shared: whether other processes listen on the port too.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(
        self, address: tuple[str, int], model: Model, callers: int = 8, waiting: int = 512, shared: bool = False
    ) -> None:
        self.model, self.shared = model, shared
        self.slots, self.accepted = threading.Semaphore(callers), threading.Semaphore(callers + waiting)
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind, together with others where that was requested."""
        if self.shared:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Wait until the model may be called."""
        if not self.accepted.acquire(blocking=False):
            raise RequestError("Model is overloaded", HTTPStatus.TOO_MANY_REQUESTS)
        try:
            with self.slots:
                yield
        finally:
            self.accepted.release()


class Handler(BaseHTTPRequestHandler):
    """One connection, which is kept for further requests."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server

    def setup(self) -> None:
        """Send small responses at once."""
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        """Return /health and /info."""
        if self.path == "/health":
            self._answer(HTTPStatus.OK, {})
        elif self.path == "/info":
            model = self.server.model
            info = {"model_id": Path(model.folder).name, "model_type": model.kind, "max_input_length": model.length}
            info |= {"max_client_batch_size": MOST_TEXTS, "runtime": is_runtime(model.inner), "pid": os.getpid()}
            self._answer(HTTPStatus.OK, info)
        else:
            self._error(RequestError(f"there is no {self.path[:80]}", HTTPStatus.NOT_FOUND))

    def do_POST(self) -> None:
        """Compute a request to the model."""
        try:
            body = self._body()
            route = ROUTES.get(self.path)
            if route is None:
                raise RequestError(f"POST to {', '.join(ROUTES)}", HTTPStatus.NOT_FOUND)
            with self.server.slot():
                found = route(self.server.model, body)
        except RequestError as error:
            self._error(error)
            return
        except Exception as error:  # noqa: BLE001  one request must not end the server
            self.log_error("%s: %s", type(error).__name__, error)
            self._error(RequestError("inference failed", HTTPStatus.INTERNAL_SERVER_ERROR))
            return
        self._answer(HTTPStatus.OK, found)

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True  # what is not read would be taken for the next request
            known = length.isascii() and length.isdigit()
            raise RequestError(f"a body has a length of at most {MOST_BYTES} bytes", HTTPStatus(413 if known else 411))
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise RequestError("the body must be JSON", HTTPStatus.BAD_REQUEST) from None
        if not isinstance(body, dict):
            raise RequestError("the body must be a JSON object", HTTPStatus.BAD_REQUEST)
        return body

    def _error(self, error: RequestError) -> None:
        kinds = {429: "Overloaded", 424: "Backend", 500: "Backend", 404: "NotFound"}
        self._answer(error.status, {"error": str(error), "error_type": kinds.get(error.status, "Validation")})

    def _answer(self, status: HTTPStatus, found: Any) -> None:
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  its name in the base class
        """Log errors alone."""

    def log_error(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log an error."""
        sys.stderr.write(f"{format % args}\n")


def main() -> None:
    """Load, say where, and serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or of what hf_sparse.save_runtime wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 = a free one")
    parser.add_argument("--backend", choices=backends(), default="auto", help="of a checkpoint, see to_runtime (auto)")
    parser.add_argument("--callers", type=int, default=8, metavar="N", help="requests computed at once (8)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this port (1)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # of each thread that computes a request: they share the cores
    children: list[subprocess.Popen[str]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the children end too
    try:
        model = Model(options.model, options.backend)
        address = (options.host, options.port)
        server = Server(address, model, options.callers, shared=options.workers > 1 or "SERVE_SHARED" in os.environ)
        port = server.server_address[1]
        again = [sys.executable, __file__, options.model, "--host", options.host, "--port", str(port)]
        again += ["--backend", options.backend, "--callers", str(options.callers)]
        environment = {**os.environ, "SERVE_SHARED": "1"}
        for _ in range(options.workers - 1):
            child = subprocess.Popen(again, env=environment, stdout=subprocess.PIPE, text=True)
            children.append(child)
        for child in children:
            if child.stdout is None or not child.stdout.readline():
                raise SparsityError("another process of this server could not start")
        print(f"ready {options.host}:{port} {model.kind}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    except (SparsityError, OSError) as error:
        raise SystemExit(f"server: {error}") from None
    finally:
        for child in children:
            child.terminate()


if __name__ == "__main__":
    main()
