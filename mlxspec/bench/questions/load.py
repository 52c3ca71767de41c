"""A server under load: streams that arrive at random, clients that leave, and slow readers.

    python -m mlxspec.bench load           # 64 streams at a time for 60 s
    python -m mlxspec.bench load --streams 8 --seconds 10 --json FILE

Every text is asked for once alone beforehand, and under load it must be the same. A share of the
clients goes away in the middle, some read slowly. At the end nothing may be left: no text that is
written or waits, and no memory that grows while the load lasts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from mlxspec.bench.clients import TIMEOUT, Answer, Process, free_port, quantile, serving, streamed
from mlxspec.bench.prompt_sets import beginnings
from mlxspec.bench.questions.common import JsonFile, PairOption, write
from mlxspec.defaults import DEFAULT_PAIR
from mlxspec.device import machine

CUT, SLOW = 0.05, 0.1  # shares of clients that go away, and that read slowly
REST_S = 0.1  # of a slow reader, after every part
LONGEST_WAIT_S = 0.5  # between two requests of one client


def bodies(count: int, prompts: Sequence[str], rng: random.Random) -> list[dict[str, Any]]:
    """Requests for texts that their seeds decide, half of them greedy."""
    return [
        {
            "prompt": rng.choice(prompts),
            "max_tokens": rng.choice((8, 16, 32, 64)),
            "temperature": rng.choice((0, 0.8)),
            "seed": number,
        }
        for number in range(count)
    ]


async def alone(url: str, wanted: Sequence[dict[str, Any]]) -> list[str]:
    """The text of each request, one after the other."""
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
        return [(await streamed(client, body)).text for body in wanted]


class Loading:
    """Clients that ask for texts at random until the time is up, and what came of it."""

    def __init__(self, url: str, wanted: Sequence[dict[str, Any]], texts: Sequence[str]) -> None:
        self.answers: list[Answer] = []
        self.cut = self.slow = self.refused = self.lost = self.different = 0
        self._url = url
        self._wanted = list(zip(wanted, texts, strict=True))

    async def run(self, streams: int, seconds: float, rng: random.Random) -> None:
        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=streams)
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT, limits=limits) as client:
            await asyncio.gather(*(self._client(client, until, rng) for _ in range(streams)))

    async def _client(self, client: httpx.AsyncClient, until: float, rng: random.Random) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(rng.uniform(0, LONGEST_WAIT_S))
            body, text = rng.choice(self._wanted)
            kind = rng.random()
            if kind < CUT:
                self.cut += 1
                await streamed(client, body, leave_after=rng.randrange(4))
                continue
            slow = kind < CUT + SLOW
            self.slow += slow
            self._ended(await streamed(client, body, pause_s=REST_S * slow), text, slow=slow)

    def _ended(self, answer: Answer, text: str, *, slow: bool) -> None:
        if answer.status == httpx.codes.TOO_MANY_REQUESTS:
            self.refused += 1
        elif not answer.whole:
            self.lost += 1
        else:
            self.different += answer.text != text
            if not slow:
                self.answers.append(answer)

    def figures(self, seconds: float) -> dict[str, Any]:
        first = [one.first_s for one in self.answers]
        gaps = [gap for one in self.answers for gap in one.gaps_s]
        return {
            "answers": len(self.answers),
            "cut": self.cut,
            "slow": self.slow,
            "refused": self.refused,
            "lost": self.lost,
            "different": self.different,
            "tokens_per_second": sum(one.tokens for one in self.answers) / seconds,
            "first_s": {"p50": quantile(first, 0.5), "p95": quantile(first, 0.95)},
            "between_s": {"p50": quantile(gaps, 0.5), "p95": quantile(gaps, 0.95)},
        }


async def aborted(url: str, count: int, body: dict[str, Any], rng: random.Random) -> None:
    """Ask for texts and go away at once, or after a few parts."""
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:

        async def one() -> None:
            try:
                async with asyncio.timeout(rng.uniform(0.0, 0.3)):
                    await streamed(client, body, leave_after=2)
            except TimeoutError:
                pass

        for _ in range(count // 32 + 1):
            await asyncio.gather(*(one() for _ in range(32)))


def rest(url: str) -> dict[str, Any]:
    """What the server still does, once it has had a moment."""
    for _ in range(50):
        found: dict[str, Any] = httpx.get(f"{url}/ready", timeout=10).json()
        if found.get("running") == 0 and found.get("waiting") == 0:
            return found
        time.sleep(0.1)
    return found


def measured(
    server: Process, streams: int, seconds: float, aborts: int, prompts: Sequence[str]
) -> dict[str, Any]:
    """What became of all requests, and of the server's memory in 2²⁰ bytes."""
    rng = random.Random(0)
    wanted = bodies(24, prompts, rng)
    loading = Loading(server.url, wanted, asyncio.run(alone(server.url, wanted)))
    # Half of the load warms up: graphs are traced, and caches reach their size.
    asyncio.run(loading.run(streams, seconds / 2, rng))
    before_mb = server.resident_mb
    asyncio.run(loading.run(streams, seconds / 2, rng))
    after_mb = server.resident_mb
    asyncio.run(aborted(server.url, aborts, wanted[0] | {"max_tokens": 256}, rng))
    return {
        **loading.figures(seconds),
        "aborted": aborts,
        "left": rest(server.url),
        "resident_mb": {
            "before": before_mb,
            "after": after_mb,
            "after_aborts": server.resident_mb,
        },
    }


def main(
    pair: PairOption = DEFAULT_PAIR,
    streams: Annotated[int, typer.Option(min=1, help="At a time.")] = 64,
    seconds: Annotated[float, typer.Option(min=2, help="That the load lasts.")] = 60.0,
    aborts: Annotated[int, typer.Option(min=0, help="Clients that go away afterwards.")] = 1000,
    rows: Annotated[int, typer.Option(min=1, max=32, help="Of the server.")] = 16,
    output: JsonFile = None,
) -> None:
    """Load a server, and count what goes wrong: nothing should."""
    port = free_port()
    options = ["--port", str(port), "--max-rows", str(rows), "--max-queue", str(streams)]
    prompts = beginnings("python")[:12]
    with serving(["-m", "mlxspec", "serve", "--pair", pair, *options], "/ready", port) as server:
        figures = measured(server, streams, seconds, aborts, prompts)
    about = {"pair": pair, "machine": machine.about(), "streams": streams, "seconds": seconds}
    result = {**about, "rows": rows, **figures}
    Console().print_json(data=result)
    write(result, output)
    if figures["lost"] or figures["different"]:
        raise typer.Exit(1)
