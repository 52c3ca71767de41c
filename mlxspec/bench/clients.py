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
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from mlxspec.errors import MlxspecError

START_S = 180.0  # until a server has loaded
TIMEOUT = httpx.Timeout(120.0)


@dataclass
class Answer:
    """One streamed text.

    status: of HTTP, 0 where nothing answered. parts: the text, with the seconds from the request to
    each part. tokens: of it, as the server counts them; 0 where it does not. prompt_tokens, cached:
    the same of the prompt. retry_after: seconds, as the server asks for them.
    whole: whether the stream ended as it should. fault: why not, in words behind a server's name.
    """

    status: int = 0
    parts: list[tuple[float, str]] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached: int = 0
    retry_after: str = ""
    finish_reason: str = ""
    total_s: float = 0.0
    whole: bool = False
    fault: str = ""

    @property
    def text(self) -> str:
        return "".join(part for _, part in self.parts)

    @property
    def first_s(self) -> float:
        """Seconds until the first text; 0 without any."""
        return self.parts[0][0] if self.parts else 0.0

    @property
    def gaps_s(self) -> list[float]:
        """Between one part of the text and the next."""
        times = [at for at, _ in self.parts]
        return [after - before for before, after in pairwise(times)]


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
    path: str = "/v1/completions",
    pause_s: float = 0.0,
    leave_after: int | None = None,
) -> Answer:
    """Ask for a completion as a stream, and read it. Whatever goes wrong is in the answer.

    Args:
        path: /v1/completions, or /v1/chat/completions with messages in the body.
        pause_s: seconds of rest after each part, as a slow reader takes.
        leave_after: parts after which the client goes away.
    """
    answer = Answer()
    started = time.perf_counter()
    try:
        await _read(client, path, body, answer, pause_s, leave_after)
    except httpx.TimeoutException:
        answer.fault = "did not answer in time"
    except httpx.ConnectError:
        answer.fault = "cannot be reached"
    except httpx.HTTPError:
        answer.fault = "broke off its answer"
    except (ValueError, LookupError, TypeError, AttributeError):
        answer.fault = "sent something that is no answer"
    answer.total_s = time.perf_counter() - started
    return answer


async def _read(
    client: httpx.AsyncClient,
    path: str,
    body: Mapping[str, Any],
    answer: Answer,
    pause_s: float,
    leave_after: int | None,
) -> None:
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    async with client.stream("POST", path, json=asked) as response:
        answer.status = response.status_code
        answer.retry_after = response.headers.get("Retry-After", "")
        lines: Any = response.aiter_lines()
        async with aclosing(lines):
            async for line in lines:
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    answer.whole = True
                    return
                text = _taken(json.loads(data), answer)
                if answer.fault:
                    return
                if not text:
                    continue
                answer.parts.append((time.perf_counter() - started, text))
                if leave_after is not None and len(answer.parts) > leave_after:
                    return
                if pause_s:
                    await asyncio.sleep(pause_s)
    # Some servers end without the mark, but none without a reason.
    answer.whole = bool(answer.finish_reason)
    if not answer.whole and answer.status == httpx.codes.OK:
        cut = bool(answer.parts)
        answer.fault = "broke off its answer" if cut else "sent something that is no answer"


def _taken(chunk: Mapping[str, Any], answer: Answer) -> str:
    """The text of one chunk, reasoning included; what else it tells goes into the answer."""
    if chunk.get("error") is not None:
        answer.fault = "told an error in the middle of its answer"
        return ""
    usage = chunk.get("usage") or {}
    answer.tokens = usage.get("completion_tokens") or answer.tokens
    answer.prompt_tokens = usage.get("prompt_tokens") or answer.prompt_tokens
    answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or answer.cached
    text = ""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        pieces = (delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content"))
        text += "".join(piece or "" for piece in (*pieces, choice.get("text")))
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    return text


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that so large a share of the others do not exceed; None of no values."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None
