"""A way to an MLflow server on loopback that fails when it is told to, as networks and overloaded servers do."""

from __future__ import annotations

import http.client
import select
import socket
import struct
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

Fault = Literal["silent", "lost", "error", "reset", "drip", "late"]
"""What becomes of a request: it is read and never answered; it is carried out, and its answer never comes; it is
answered by 500; its connection is reset; its answer comes byte by byte, one a second; or it waits until there is no
fault any more, and is carried out then."""


class Gateway:
    """To be entered with `with`.

    Args:
        server: address of the server that requests are passed on to; None: there is none, every request fails.
        fault: what becomes of them from the start; None: they are passed on.

    Attributes:
        address: that clients are given.
        fault: may be set at any time.
        after: so many requests are still passed on before `fault` begins.
        until: and all until one whose path has this; empty: none.
        failed: how many a fault has befallen.
        passed: method and path of the requests that have come to the server.
    """

    def __init__(self, server: str | None = None, fault: Fault | None = None) -> None:
        self.fault, self.after, self.until, self.failed = fault, 0, "", 0
        self.passed: list[str] = []
        self._server, self._lock, self._closing = server, threading.Lock(), threading.Event()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                gateway._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that has given up

        self._listener = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._listener.server_address[1]}"

    def __enter__(self) -> Gateway:
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), name="gateway", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        self._listener.shutdown()
        self._listener.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            if self.until in handler.path:
                self.until = ""
            waits = bool(self.after or self.until)
            fault, self.after = None if waits else self.fault, max(self.after - 1, 0)
            self.failed += fault is not None
        while fault == "late" and self.fault is not None and not self._closing.wait(0.05):
            pass
        if fault == "late":
            fault = None
        if fault is None or fault == "lost":
            answer = self._pass_on(handler, body)
            if fault is None:
                handler.wfile.write(answer)
                return
        handler.close_connection = True
        if fault in ("silent", "lost"):
            self._wait_for_end(handler.connection)
        elif fault == "error":
            handler.wfile.write(_message(500, [], b'{"error_code": "INTERNAL_ERROR", "message": "as told"}'))
        elif fault == "reset":
            # Closed with nothing lingering, a connection is reset.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        elif fault == "drip":
            for byte in _message(200, [], b"{" + b" " * 100_000 + b"}"):
                handler.wfile.write(bytes([byte]))
                if self._closing.wait(1.0):
                    return

    def _pass_on(self, handler: BaseHTTPRequestHandler, body: bytes) -> bytes:
        """The server's answer."""
        assert self._server is not None, "there is no server to pass a request on to"
        parts = urlsplit(self._server)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=120)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() != "connection"}
            connection.request(handler.command, handler.path, body, headers | {"Connection": "close"})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        self.passed.append(f"{handler.command} {handler.path}")
        kept = [(n, v) for n, v in answer.getheaders() if n.lower() in ("content-type", "content-disposition")]
        return _message(answer.status, kept, content)

    def _wait_for_end(self, connection: socket.socket) -> None:
        """Until the client has hung up, or this is closed."""
        while not self._closing.is_set():
            if select.select([connection], [], [], 0.1)[0] and not connection.recv(65536):
                return


def _message(status: int, headers: Iterable[tuple[str, str]], content: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.client.responses[status]}", *(f"{name}: {value}" for name, value in headers)]
    lines += [f"Content-Length: {len(content)}", "Connection: keep-alive", "", ""]
    return "\r\n".join(lines).encode() + content
