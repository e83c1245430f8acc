"""Connections to our server: how many there are, how long a request may take to arrive, and what is let through."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
import threading
import time
from dataclasses import replace
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Protocol

from mlxlora.requests import MAX_BODY, Refused, Rules, refuse

SECONDS = 60.0  # for a client to send its request, all of it; and for it to take each piece of the answer
CONNECTIONS = 128  # at a time; more are closed at once

log = logging.getLogger("mlxlora.serve")


class Owner(Protocol):
    """The server that connections belong to."""

    rules: Rules

    def count(self, *, refused: bool) -> None:
        """Note a request."""
        ...


class Listener(ThreadingHTTPServer):
    """A thread for each connection, and no more threads than are good for a machine."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, as long as there are some."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def server_bind(self) -> None:
        """As the base class, which would also look up the name of the address: a question to the network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; anything else is one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            log.warning("a request failed: %s: %s", type(error).__name__, error)


class Arriving(io.RawIOBase):
    """What a client sends, as long as all of it comes in time: one byte a minute would hold a thread for ever."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = time.monotonic() + SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request does not come to an end")
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(SECONDS)


class Guarded:
    """Stands before mlx-lm's handler: a request that the rules refuse never reaches it."""

    owner: Owner
    timeout = SECONDS
    server_version = "mlxlora"
    sys_version = ""
    protocol_version = "HTTP/1.0"
    headers: Any
    path: str
    rfile: Any
    wfile: Any
    connection: socket.socket

    def setup(self) -> None:
        """As the base class, but for the time that a request may take to arrive."""
        super().setup()  # type: ignore[misc]
        self.rfile.close()
        self.rfile = io.BufferedReader(Arriving(self.connection))

    def log_message(self, format: str, *args: Any) -> None:
        log.info("%s", (format % args).encode("ascii", "backslashreplace").decode())

    def do_GET(self) -> None:
        """`/health` and `/v1/models`."""
        if self._allowed():
            super().do_GET()  # type: ignore[misc]

    def do_OPTIONS(self) -> None:
        """What a web page asks before it calls; it cannot send the token yet."""
        if self._allowed(without_token=True):
            super().do_OPTIONS()  # type: ignore[misc]

    def do_POST(self) -> None:
        """Completions."""
        if not self._allowed():
            return
        try:
            body = self.owner.rules.check_body(self.path, self.headers.get("Content-Type"), self._read())
        except Refused as refused:
            self._refuse(refused)
            return
        raw = json.dumps(body).encode()
        self.rfile = io.BytesIO(raw)
        self.headers.replace_header("Content-Length", str(len(raw)))
        self.owner.count(refused=False)
        super().do_POST()  # type: ignore[misc]

    def handle_models_request(self) -> None:
        """The names that this server answers to, and none from elsewhere on the machine."""
        created: int = self.created  # type: ignore[attr-defined]
        listed = [{"id": name, "object": "model", "created": created} for name in self.owner.rules.names()]
        self._answer(200, {"object": "list", "data": listed})

    def _read(self) -> bytes:
        length = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") or length is None:
            refuse("A Content-Length header is required.", 411)
        if not (length.isascii() and length.isdigit()):
            refuse("The Content-Length header is not a number.")
        if int(length) > MAX_BODY:
            refuse(f"A request may have {MAX_BODY >> 20} MiB.", 413)
        raw: bytes = self.rfile.read(int(length))
        if len(raw) != int(length):
            refuse("The request ended before its Content-Length.")
        return raw

    def _allowed(self, *, without_token: bool = False) -> bool:
        rules = self.owner.rules
        try:
            if self.headers.get_all("Host", [])[1:] or self.headers.get_all("Content-Length", [])[1:]:
                refuse("A header is given twice.")
            if without_token:
                rules = replace(rules, token=None)
            rules.check_origin(self.headers)
        except Refused as refused:
            self._refuse(refused)
            return False
        return True

    def _refuse(self, refused: Refused) -> None:
        self.owner.count(refused=True)
        self._answer(refused.status, {"error": {"message": str(refused), "type": "invalid_request_error"}})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        handler: Any = self
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        if status == 401:
            handler.send_header("WWW-Authenticate", "Bearer")
        origin = self.headers.get("Origin")
        if origin in self.owner.rules.origins:
            handler.send_header("Access-Control-Allow-Origin", origin)
            handler.send_header("Vary", "Origin")
        handler.end_headers()
        self.wfile.write(content)
