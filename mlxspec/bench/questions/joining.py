"""The share of the time that texts take to join a batch and to leave it.

    python -m mlxspec.bench joining                     # the embedded pair, 32 tokens a text
    python -m mlxspec.bench joining --rows 8 --max-tokens 128

Twice as many texts as rows are written, plainly, so that half of them join beside others. The
device comes to rest before and after each change of the rows, which a batch would not wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

from mlxspec.bench.prompt_sets import beginnings
from mlxspec.bench.questions.common import JsonFile, PairOption, write
from mlxspec.decode.engine import Engine
from mlxspec.decode.lane import Lane
from mlxspec.defaults import DEFAULT_PAIR
from mlxspec.device import machine
from mlxspec.pairs.loading import load

ROWS = (1, 2, 4, 8, 16)


@contextmanager
def timed_changes() -> Iterator[dict[str, list[float]]]:
    """While the block runs, the seconds of every `Lane.join` and `Lane.leave`, by name."""
    spent: dict[str, list[float]] = {"join": [], "leave": []}
    usual = {name: getattr(Lane, name) for name in spent}

    def timed(name: str) -> Callable[..., None]:
        def call(lane: Lane, *arguments: Any) -> None:
            _rest(lane)
            started = time.perf_counter()
            usual[name](lane, *arguments)
            _rest(lane)
            spent[name].append(time.perf_counter() - started)

        return call

    for name in spent:
        setattr(Lane, name, timed(name))
    try:
        yield spent
    finally:
        for name, method in usual.items():
            setattr(Lane, name, method)


def share(engine: Engine, texts: list[str], rows: int, max_tokens: int) -> float:
    """The share of the time that joining and leaving take, with so many rows.

    Of each kind of change the median counts, because another program may come between.
    """
    prompts = list(islice(cycle(texts), 2 * rows))
    options: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": True, "draft_tokens": 0}
    engine.generate_many(prompts, max_rows=rows, **options)  # builds the rounds
    with timed_changes() as spent:
        started = time.perf_counter()
        engine.generate_many(prompts, max_rows=rows, **options)
        took_s = time.perf_counter() - started
    return sum(len(one) * median(one) for one in spent.values()) / took_s


def _rest(lane: Lane) -> None:
    if lane.tracks:
        mx.eval(lane.state)


def main(
    pair: PairOption = DEFAULT_PAIR,
    rows: Annotated[list[int] | None, typer.Option(help="Texts at a time; repeatable.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 32,
    output: JsonFile = None,
) -> None:
    """Measure what joining a batch and leaving it take."""
    engine = load(pair, compiled=True)
    texts = list(beginnings("python"))
    shares = {number: share(engine, texts, number, max_tokens) for number in rows or ROWS}
    table = Table("rows", "joining and leaving, of the time", box=None)
    for number, found in shares.items():
        table.add_row(str(number), f"{found:.1%}")
    about = machine.about()
    Console().print(machine.described(about), table, sep="\n")
    write({"machine": about, "pair": pair, "max_tokens": max_tokens, "shares": shares}, output)
