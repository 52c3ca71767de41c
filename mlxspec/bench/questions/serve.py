"""`mlxspec serve` beside `mlx_lm.server` on the same weights, by the number of clients.

    python -m mlxspec.bench serve
    python -m mlxspec.bench serve --clients 1 --clients 4 --count 3 --json FILE

Every client asks for one text after the other, greedily, as a stream. All servers run from the
beginning, and they take turns; what they write in a first turn is not counted. Ratios are taken
turn by turn, and a median is quoted with its interval of 95%, which one turn alone does not give.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle, islice
from statistics import median
from typing import Annotated, Any

import httpx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.clients import TIMEOUT, Answer, free_port, serving, streamed
from mlxspec.bench.prompt_sets import beginnings
from mlxspec.bench.questions.common import JsonFile, PairOption, write
from mlxspec.bench.statistics import interval_of_ratio
from mlxspec.defaults import DEFAULT_PAIR
from mlxspec.device import machine
from mlxspec.pairs.folders import fetch
from mlxspec.pairs.table import find_pair

CLIENTS = (1, 2, 4, 8, 16)
OURS, THEIRS, DRAFTED = "mlxspec", "mlx_lm", "mlx_lm, draft"


async def ask(url: str, prompts: Sequence[str], clients: int, max_tokens: int) -> list[Answer]:
    """The answers to prompts that so many clients share among themselves."""
    waiting, answers = list(reversed(prompts)), []

    async def one(client: httpx.AsyncClient) -> None:
        while waiting:
            body = {"prompt": waiting.pop(), "max_tokens": max_tokens, "temperature": 0}
            answers.append(await streamed(client, body))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return answers


def turn(url: str, prompts: Sequence[str], clients: int, max_tokens: int) -> dict[str, float]:
    """Tokens per second, requests per second, and the median until the first text."""
    started = time.perf_counter()
    answers = asyncio.run(ask(url, prompts, clients, max_tokens))
    took_s = time.perf_counter() - started
    lost = [one for one in answers if not one.whole or one.status != httpx.codes.OK]
    return {
        "tokens_per_second": sum(one.tokens for one in answers) / took_s,
        "requests_per_second": len(answers) / took_s,
        "first_s": median(one.first_s for one in answers),
        "lost": len(lost),
    }


def measured(
    urls: dict[str, str], prompts: Sequence[str], clients: int, count: int, max_tokens: int
) -> dict[str, Any]:
    """The figures of every server with so many clients."""
    texts = list(islice(cycle(prompts), max(2 * clients, 4)))
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
    for number in range(count + 1):
        names = list(urls) if number % 2 else list(urls)[::-1]
        for name in names:
            figures = turn(urls[name], texts, clients, max_tokens)
            if number:
                turns[name].append(figures)
    speeds = {name: [one["tokens_per_second"] for one in some] for name, some in turns.items()}
    firsts = {name: [one["first_s"] for one in some] for name, some in turns.items()}
    return {
        "clients": clients,
        "turns": turns,
        "over": {name: ratio(speeds[OURS], speeds[name]) for name in urls if name != OURS},
        "first_over": {name: ratio(firsts[OURS], firsts[name]) for name in urls if name != OURS},
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float | None]:
    """The median of the turns' ratios and its interval; None where that is not known."""
    found = interval_of_ratio(above, below)
    limits = (found.low, found.high) if found.is_known else (None, None)
    return {"median": found.median, "low": limits[0], "high": limits[1]}


def in_words(found: Mapping[str, float | None]) -> str:
    """A ratio as `ratio` gives it."""
    low, high = found["low"], found["high"]
    limits = "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"
    return f"{found['median']:.2f} ({limits})"


def show(result: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    console.print(
        f"{machine.described(result['machine'])}; {result['max_tokens']} tokens of each text, "
        "greedy; ratios with 95% intervals"
    )
    table = Table("clients", "server", "tok/s", "req/s", "first", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("mlxspec/it, tok/s")
    table.add_column("mlxspec/it, first")
    table.add_column("lost")
    for one in result["clients"]:
        for name, turns in one["turns"].items():
            middle = {key: median(each[key] for each in turns) for key in turns[0]}
            over = one["over"].get(name), one["first_over"].get(name)
            cells = [in_words(each) if each else "" for each in over]
            table.add_row(
                str(one["clients"]),
                name,
                f"{middle['tokens_per_second']:.0f}",
                f"{middle['requests_per_second']:.2f}",
                f"{middle['first_s'] * 1e3:.0f} ms",
                *cells,
                str(int(sum(each["lost"] for each in turns))),
            )
    console.print(table)


def main(
    pair: PairOption = DEFAULT_PAIR,
    clients: Annotated[list[int] | None, typer.Option(help="At a time; repeatable.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Turns.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 64,
    output: JsonFile = None,
) -> None:
    """Compare `mlxspec serve` with `mlx_lm.server`, with and without its draft."""
    chosen = find_pair(pair)
    folders = fetch(chosen)
    ours, theirs, drafted = free_port(), free_port(), free_port()
    # As many texts at a time as there are clients; the other server takes up to 32.
    rows = str(max(clients or CLIENTS))
    served = ["-m", "mlxspec", "serve", "--pair", pair, "--max-rows", rows]
    target = ["-m", "mlx_lm", "server", "--model", str(folders.target), "--port"]
    draft = ["--draft-model", str(next(iter(folders.drafts.values())))]
    commands = {
        OURS: ([*served, "--port", str(ours)], "/ready", ours),
        THEIRS: ([*target, str(theirs)], "/v1/models", theirs),
        DRAFTED: ([*target, str(drafted), *draft], "/v1/models", drafted),
    }
    prompts = beginnings("python")
    with ExitStack() as running:
        urls = {
            name: running.enter_context(serving(*command)).url for name, command in commands.items()
        }
        found = [
            measured(urls, prompts, number, count, max_tokens)
            for number in track(clients or CLIENTS, "asking", transient=True)
        ]
    about = {"pair": pair, "machine": machine.about(), "max_tokens": max_tokens}
    result = {**about, "clients": found}
    show(result, Console(width=max(Console().width, 120)))
    write(result, output)
