"""Servers in processes of their own, and clients that read streams and take the time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from mlxspec.errors import MlxspecError

START_S = 180.0  # until a server has loaded
TIMEOUT = httpx.Timeout(120.0)


@dataclass
class Answer:
    """One streamed text.

    text: as it came. tokens: of it, as the server counts them. status: of HTTP.
    first_s: until the first text. gaps_s: between one part of the text and the next.
    whole: whether the stream ended as it should.
    """

    status: int = 0
    text: str = ""
    tokens: int = 0
    first_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    whole: bool = False


@dataclass(frozen=True)
class Process:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def resident_mb(self) -> float:
        """Memory of the process in 2²⁰ bytes."""
        asked = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        return int(subprocess.check_output(asked)) / 1024


@contextmanager
def serving(command: Sequence[str], path: str, port: int, **environment: str) -> Iterator[Process]:
    """A server in a process of its own, until the block ends.

    Args:
        command: of Python's. path: answers 200 once it is ready. port: where it listens.

    Raises:
        MlxspecError: it does not get ready.
    """
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    call = [sys.executable, *command]
    with subprocess.Popen(call, stderr=subprocess.DEVNULL, env=environ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, f"{url}{path}", " ".join(command))
            yield Process(url, process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], url: str, command: str) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise MlxspecError(
        f"The server did not get ready: python {command}.", hint="Run it by hand to see why."
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


async def streamed(
    client: httpx.AsyncClient,
    body: Mapping[str, Any],
    *,
    pause_s: float = 0.0,
    leave_after: int | None = None,
) -> Answer:
    """Ask for a completion as a stream, and read it.

    Args:
        pause_s: seconds of rest after each part, as a slow reader takes.
        leave_after: parts after which the client goes away.
    """
    answer = Answer()
    started = time.perf_counter()
    with suppress(httpx.HTTPError):  # the connection was lost: the answer is not whole
        await _read(client, body, answer, pause_s, leave_after)
    answer.total_s = time.perf_counter() - started
    return answer


async def _read(
    client: httpx.AsyncClient,
    body: Mapping[str, Any],
    answer: Answer,
    pause_s: float,
    leave_after: int | None,
) -> None:
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    started = last = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        answer.status = response.status_code
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                answer.whole = True
                break
            chunk = json.loads(line.removeprefix("data: "))
            answer.tokens = (chunk.get("usage") or {}).get("completion_tokens", answer.tokens)
            text = "".join(choice.get("text") or "" for choice in chunk.get("choices", ()))
            if not text:
                continue
            now = time.perf_counter()
            if answer.text:
                answer.gaps_s.append(now - last)
            else:
                answer.first_s = now - started
            answer.text, last = answer.text + text, now
            if leave_after is not None and len(answer.gaps_s) >= leave_after:
                break
            if pause_s:
                await asyncio.sleep(pause_s)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that so large a share of the others do not exceed; None of no values."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None
