"""An upstream on loopback that misbehaves in the way that it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mlxspec.cascade.client import Client
from mlxspec.cascade.upstreams import Upstream

KEY = "sk-s3cret-0123456789"
STALL_S = 5.0  # longer than any test lets an upstream take


@dataclass
class Misbehaving:
    """`ways` are taken in turn, the last one again and again; `bodies` are what it was asked.

    models: that it names; None has no list of them. key: that it asks for, to show the list.
    """

    url: str
    ways: list[str]
    text: str = "An answer from far away."
    left: int = 0  # of those who asked and did not wait
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    models: list[str] | None = field(default_factory=lambda: ["far"])
    key: str | None = None

    def way(self) -> str:
        return self.ways.pop(0) if len(self.ways) > 1 else self.ways[0]


def chunk(text: str, finish: str | None = None, **beside: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    named = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "far"}
    return b"data: " + json.dumps(named | {"choices": [choice]} | beside).encode() + b"\n\n"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        """The list of models."""
        one: Misbehaving = self.server.one
        one.keys.append(self.headers["Authorization"])
        self.close_connection = True
        if one.models is None:
            self._refuse(404, "")
        elif one.key is not None and self.headers["Authorization"] != f"Bearer {one.key}":
            self._refuse(401, "")
        else:
            self._begin("application/json")
            listed = [{"id": name, "owned_by": "somebody"} for name in one.models]
            self.wfile.write(json.dumps({"object": "list", "data": listed}).encode())

    def do_POST(self) -> None:
        one: Misbehaving = self.server.one
        one.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        one.keys.append(self.headers["Authorization"])
        way, _, detail = one.way().partition(" ")
        self.close_connection = True
        try:
            if way.isdecimal():
                self._refuse(int(way), detail)
            else:
                getattr(self, f"_{way}")(one)
        except OSError:
            one.left += 1

    def _refuse(self, status: int, retry_after: str) -> None:
        # As some hosts do, it repeats the key in its error.
        body = json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}}).encode()
        self.send_response(status)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # or the next request takes a connection that ends
        self.end_headers()
        self.wfile.write(body)

    def _begin(self, kind: str = "text/event-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        self.end_headers()

    def _answer(self, one: Misbehaving) -> None:
        self._begin()
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        self.wfile.write(chunk(one.text) + chunk("", "stop", usage=usage) + b"data: [DONE]\n\n")

    def _untold(self, one: Misbehaving) -> None:
        """A whole answer without counts of tokens."""
        self._begin()
        self.wfile.write(chunk(one.text, "stop") + b"data: [DONE]\n\n")

    def _cached(self, one: Misbehaving) -> None:
        """Two parts with a rest between them; the prompt was read before."""
        self._begin()
        self.wfile.write(chunk(one.text[:9]))
        time.sleep(0.05)
        usage = {"prompt_tokens": 1000, "completion_tokens": 100}
        usage |= {"prompt_tokens_details": {"cached_tokens": 990}}  # type: ignore[dict-item]
        self.wfile.write(chunk(one.text[9:]) + chunk("", "stop", usage=usage) + b"data: [DONE]\n\n")

    def _slow(self, one: Misbehaving) -> None:
        time.sleep(STALL_S)

    def _stalled(self, one: Misbehaving) -> None:
        """It sends comments, as servers do to keep a connection, and never an answer."""
        self._begin()
        for _ in range(int(STALL_S / 0.05)):
            self.wfile.write(b": wait\n\n")
            time.sleep(0.05)

    def _cut(self, one: Misbehaving) -> None:
        self._begin()
        self.wfile.write(chunk(one.text[:5]))

    def _broken_chunk(self, one: Misbehaving) -> None:
        """The connection ends within what the transfer announced."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"400\r\n" + chunk(one.text[:5]))

    def _error(self, one: Misbehaving) -> None:
        self._begin()
        told = {"error": {"message": f"failed for {self.headers['Authorization']}"}}
        self.wfile.write(chunk(one.text[:5]) + b"data: " + json.dumps(told).encode() + b"\n\n")

    def _nonsense(self, one: Misbehaving) -> None:
        self._begin()
        self.wfile.write(b"data: {no json\n\n")

    def _page(self, one: Misbehaving) -> None:
        self._begin("text/html")
        self.wfile.write(b"<html>Log in first</html>")

    def _other(self, one: Misbehaving) -> None:
        """JSON of another shape."""
        self._begin()
        self.wfile.write(b'data: {"choices": [{"delta": "text"}]}\n\ndata: [1]\n\n')

    def _empty(self, one: Misbehaving) -> None:
        self._begin()
        self.wfile.write(chunk("", "stop") + b"data: [DONE]\n\n")


def upstream(url: str, **changes: Any) -> Upstream:
    """The upstream `far`, whose key is in THE_KEY."""
    given = {"api_key_env": "THE_KEY", "timeout_s": 20.0, "price_in": 1.0, "price_out": 10.0}
    return Upstream("far", url, "far-model", **given | changes)


def asked(one: Misbehaving, **changes: Any) -> Client:
    """A client that does not wait between tries."""

    async def sleep(seconds: float) -> None:
        pass

    return Client(upstream(one.url, **changes), sleep=sleep)


@contextmanager
def misbehaving(*ways: str) -> Iterator[Misbehaving]:
    """An upstream that answers so: the name of a way, or a status with its `Retry-After`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    one = Misbehaving(f"http://127.0.0.1:{server.server_port}/v1", list(ways))
    server.one = one  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield one
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
