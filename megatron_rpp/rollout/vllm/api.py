"""HTTP to one vLLM server: a new connection for each request, so that none is idle when it is used.

Answers are JSON. Every failure that may pass is a `Failure`; what cannot pass, because the server
refuses the request itself, is a `Refused`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from socket import AF_UNIX, SHUT_RDWR, socket
from threading import Lock
from typing import Any

from megatron_rpp.lifecycle.exit_codes import RunFailure

_SHOWN = 300
"""Characters of an answer that messages show."""
_HEALTH_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_MOST_BYTES = 2**26
"""Most bytes of an answer, or of an event of a stream."""
_PIECE = 2**16
_MAY_PASS = (408, 425, 429)
"""Answers of the 400s that say nothing about the request."""


class Failure(Exception):
    """A request failed in a way that may not occur again."""


class Refused(RunFailure):
    """The server answers that the request is wrong: sending it again would not help."""


class _UnixConnection(HTTPConnection):
    """A connection to a server's socket file."""

    def __init__(self, path: str, seconds: float):
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = socket(AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _connection(address: str, seconds: float) -> HTTPConnection:
    if address.startswith("/"):
        return _UnixConnection(address, seconds)
    return HTTPConnection(address, timeout=seconds)


def _connect(connection: HTTPConnection) -> None:
    try:
        connection.connect()
    except TimeoutError as error:
        raise Failure(f"there was no connection within {connection.timeout:.0f} s") from error


class Connections:
    """The open connections, which another thread may close to end all requests at once."""

    def __init__(self) -> None:
        self._lock, self._open, self.closed = Lock(), set[socket](), False

    @contextmanager
    def opened(self, address: str, timeout: float) -> Iterator[HTTPConnection]:
        connection = _connection(address, min(timeout, _CONNECT_SECONDS))
        try:
            _connect(connection)
            connection.sock.settimeout(timeout)
            # HTTPConnection forgets its socket while a response is read.
            with self._holding(connection.sock):
                yield connection
        finally:
            connection.close()

    @contextmanager
    def _holding(self, connected: socket) -> Iterator[None]:
        with self._lock:
            if self.closed:
                raise Failure("the requests were abandoned")
            self._open.add(connected)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connected)

    def close(self) -> None:
        """Ends all requests; vLLM aborts a request whose connection is closed."""
        with self._lock:
            self.closed = True
            for connected in self._open:
                with suppress(OSError):  # the other side has closed it
                    connected.shutdown(SHUT_RDWR)


class Server:
    """A server's address and the requests to it."""

    def __init__(self, address: str, name: str = ""):
        """address: host:port, or the path of a socket file."""
        self.address, self.name = address, name or f"the vLLM server at {address}"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        timeout: float,
        method: str = "POST",
        connections: Connections | None = None,
    ) -> Any:
        """The answer to one request. Raises Failure or Refused."""
        with self._sent(path, body, method, timeout=timeout, connections=connections) as response:
            return _parsed(_whole(response, path, timeout))

    def stream(
        self, path: str, body: Any, *, timeout: float, connections: Connections | None = None
    ) -> Iterator[Any]:
        """The events of one request, as they come. Closing the iterator aborts the request."""
        deadline = time.monotonic() + timeout
        with self._sent(path, body, "POST", timeout=timeout, connections=connections) as response:
            while line := response.readline(_MOST_BYTES):
                if time.monotonic() > deadline:
                    raise Failure(f"the answer took longer than {timeout:.0f} s")
                text = line.removeprefix(b"data:").strip()
                if line.startswith(b"data:") and text != b"[DONE]":
                    yield _parsed(text)

    @contextmanager
    def _sent(
        self,
        path: str,
        body: Any,
        method: str,
        *,
        timeout: float,
        connections: Connections | None,
    ) -> Iterator[HTTPResponse]:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            with (connections or Connections()).opened(self.address, timeout) as connection:
                connection.request(method, path, content, headers)
                response = connection.getresponse()
                if response.status != 200:
                    shown = response.read(_SHOWN).decode(errors="replace")
                    problem = f"{path} answered {response.status}: {shown}"
                    if response.status in range(400, 500) and response.status not in _MAY_PASS:
                        raise Refused(f"{self.name} refuses a request: {problem}")
                    raise Failure(problem)
                yield response
        except TimeoutError as error:
            raise Failure(f"{path} gave no answer within {timeout:.0f} s") from error
        except (OSError, HTTPException) as error:  # lost, refused or broken off
            raise Failure(f"{path}: {type(error).__name__}: {error}") from error

    def is_healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        with suppress(Failure, Refused):
            self.ask("/health", method="GET", timeout=_HEALTH_SECONDS)
            return True
        return False

    def weight_version(self) -> str:
        """The version that the last push has set. Raises Failure or Refused."""
        answer = self.ask("/weight_info", method="GET", timeout=_HEALTH_SECONDS)
        if not isinstance(answer, dict) or "weight_version" not in answer:
            raise Failure(f"/weight_info answered {str(answer)[:_SHOWN]}")
        return str(answer["weight_version"])

    def call(self, method: str, *arguments: str, timeout: float) -> dict[str, Any]:
        """What a method of inside/rpp_vllm.py returns. Raises Failure or Refused."""
        body = {"method": method, "args": list(arguments)}
        answer = self.ask("/collective_rpc", body, timeout=timeout)
        try:
            (found, *_) = answer["results"]
        except (KeyError, TypeError, ValueError):
            raise Failure(f"{method} answered {str(answer)[:_SHOWN]}") from None
        if not isinstance(found, dict):
            raise Failure(f"{method} answered {str(found)[:_SHOWN]}")
        return found


def _whole(response: HTTPResponse, path: str, seconds: float) -> bytes:
    """The content of an answer, within `seconds` from now. Raises Failure."""
    deadline, found = time.monotonic() + seconds, bytearray()
    while piece := response.read1(_PIECE):
        found += piece
        if len(found) > _MOST_BYTES:
            raise Failure(f"{path} answered more than {_MOST_BYTES} bytes")
        if time.monotonic() > deadline:
            raise Failure(f"{path} took longer than {seconds:.0f} s to answer")
    if response.length:
        raise Failure(f"{path}: the answer broke off, {response.length} bytes are missing")
    return bytes(found)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content) if content else None
    except ValueError:
        raise Failure(f"the answer is no JSON: {content[:_SHOWN]!r}") from None
