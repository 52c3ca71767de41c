"""Many texts at a time: tokens per second of all together, beside mlx-lm's batch generator.

    scripts/bench_batch
    scripts/bench_batch --rows 1 --rows 4 --count 5 --json FILE

Every contender decodes the same prompts greedily to the same number of tokens, all of them at a
time or, `serial`, one after the other. mlx-lm has the same weights as it loads them, which mlxspec
may lay out in another order. They take turns. A run that warms up is not counted, nor two
of `auto`, which begins each with what the one before has shown.
A speed is tokens of all texts over the whole time, prefill included; ratios are taken turn by turn,
and a median is quoted with the interval that 95% of resampled medians fall into.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from mlx_lm.generate import BatchGenerator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.rounds import PROMPTS
from mlxspec.bench.texts import PROSE
from mlxspec.decode.engine import Engine
from mlxspec.decode.lane import Lane
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.decode.request import GREEDY
from mlxspec.defaults import AUTO, DEFAULT_PAIR
from mlxspec.device import machine
from mlxspec.models.caches.original import Model
from mlxspec.pairs.folders import fetch
from mlxspec.pairs.loading import load
from mlxspec.pairs.models import load_folder
from mlxspec.pairs.table import find_pair

ROWS = (1, 2, 4, 8, 16)
THEIRS, PLAIN, SERIAL = "mlx-lm", "plain", "serial"
SHORT = 32  # tokens of a text whose joining and leaving is timed

Texts = list[list[int]]
Contender = Callable[[Texts], Texts]


def contenders(engine: Engine, as_loaded: Model, max_tokens: int) -> dict[str, Contender]:
    """The ways to decode prompts, by name; each returns the tokens of every text.

    Args:
        as_loaded: the engine's target, as mlx-lm loads it.
    """

    def theirs(prompts: Texts) -> Texts:
        rows = len(prompts)
        generator = BatchGenerator(
            as_loaded, completion_batch_size=rows, prefill_batch_size=min(rows, 8)
        )
        texts: dict[int, list[int]] = {
            uid: [] for uid in generator.insert(prompts, [max_tokens] * rows)
        }
        while any(len(text) < max_tokens for text in texts.values()):
            for response in generator.next_generated():
                texts[response.uid].append(int(response.token))
        generator.close()
        return list(texts.values())

    def ours(draft_tokens: Any, *, together: bool) -> Contender:
        def decode(prompts: Texts) -> Texts:
            results = engine.generate_many(
                prompts,
                max_rows=len(prompts) if together else 1,
                max_tokens=max_tokens,
                ignore_eos=True,
                draft_tokens=draft_tokens,
            )
            return [one.tokens for one in results]

        return decode

    return {
        THEIRS: theirs,
        PLAIN: ours(0, together=True),
        AUTO: ours(AUTO, together=True),
        SERIAL: ours(AUTO, together=False),
    }


def measured(ways: dict[str, Contender], prompts: Texts, count: int) -> dict[str, Any]:
    """Tokens per second of every contender, turn by turn, and whether all wrote the same."""
    ways[AUTO](prompts)  # what it learns in one run, it uses in the next
    texts = {name: decode(prompts) for name, decode in ways.items()}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(count):
        names = list(ways) if turn % 2 == 0 else list(ways)[::-1]
        for name in names:
            started = time.perf_counter()
            written = ways[name](prompts)
            speeds[name].append(sum(map(len, written)) / (time.perf_counter() - started))
    better = [max(pair) for pair in zip(speeds[PLAIN], speeds[SERIAL], strict=True)]
    return {
        "speeds": speeds,
        "same_text": all(one == texts[PLAIN] for one in texts.values()),
        "auto_over_mlx_lm": ratio(speeds[AUTO], speeds[THEIRS]),
        "plain_over_mlx_lm": ratio(speeds[PLAIN], speeds[THEIRS]),
        "auto_over_better": ratio(speeds[AUTO], better),
    }


def ratio(above: list[float], below: list[float]) -> list[float]:
    """The median of the turns' ratios, and the interval of 95% of its resamplings."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    rng = random.Random(0)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return [median(ratios), medians[50], medians[-51]]


def joining_share(engine: Engine, prompts: Texts, rows: int) -> float:
    """The share of the time that joining and leaving take, at SHORT tokens a text.

    Of each the median counts, because another program may come between.
    """
    join, leave = Lane.join, Lane.leave
    spent: dict[Any, list[float]] = {join: [], leave: []}

    def timed(change: Callable[..., None]) -> Callable[..., None]:
        def call(lane: Lane, *arguments: Any) -> None:
            if lane.tracks:
                mx.eval(lane.state)
            started = time.perf_counter()
            change(lane, *arguments)
            if lane.tracks:
                mx.eval(lane.state)
            spent[change].append(time.perf_counter() - started)

        return call

    many = prompts * 2
    options: dict[str, Any] = {"max_tokens": SHORT, "ignore_eos": True, "draft_tokens": 0}
    engine.generate_many(many, max_rows=rows, **options)
    Lane.join, Lane.leave = timed(join), timed(leave)  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        engine.generate_many(many, max_rows=rows, **options)
    finally:
        Lane.join, Lane.leave = join, leave  # type: ignore[method-assign]
    took_s = time.perf_counter() - started
    return sum(len(one) * median(one) for one in spent.values()) / took_s


def show(result: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    console.print(
        f"{machine.described(result['machine'])}; {result['max_tokens']} tokens of each text, "
        "greedy; tokens/s of all together, and ratios with 95% intervals"
    )
    names = (THEIRS, PLAIN, AUTO, SERIAL)
    ratios = ("auto_over_mlx_lm", "plain_over_mlx_lm", "auto_over_better")
    heads = ("auto/mlx-lm", "plain/mlx-lm", "auto/better")
    table = Table("rows", "texts", *names, *heads, "joining", box=SIMPLE_HEAD, padding=(0, 1))
    for one in result["rows"]:
        speeds = [f"{median(one['speeds'][name]):.0f}" for name in names]
        cells = ["{:.2f} ({:.2f}–{:.2f})".format(*one[name]) for name in ratios]
        table.add_row(str(one["rows"]), one["kind"], *speeds, *cells, f"{one['joining']:.1%}")
    console.print(table)
    console.print("better: the faster one of plain and serial, in the same turn")
    if not all(one["same_text"] for one in result["rows"]):
        console.print("the contenders wrote different texts")


def main(
    pair: Annotated[str, typer.Option(help="A pair of the table.")] = DEFAULT_PAIR,
    rows: Annotated[list[int] | None, typer.Option(help="Texts at a time; repeatable.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Turns.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 128,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Compare many texts at a time with mlx-lm's batch generator."""
    folders = fetch(find_pair(pair))
    engine = load(pair, compiled=True, folders=folders)
    as_loaded = load_folder(folders.target).model
    engine.prefixes = PrefixCache(0)  # prompts stand in it several times, and are to be read
    for draft_tokens in (AUTO, 0):
        engine.build_kernels(GREEDY, draft_tokens, beside=True)
    code = [entry["text"] for entry in json.loads(PROMPTS.read_text())]
    ways = contenders(engine, as_loaded, max_tokens)
    kinds = {"code": code, "prose": list(PROSE) * 4}
    found = []
    for number in track(rows or ROWS, "decoding", transient=True):
        for kind, texts in kinds.items():
            prompts = [engine.encode(text) for text in texts[:number]]
            figures = measured(ways, prompts, count)
            joining = joining_share(engine, prompts, number)
            found.append({"rows": number, "kind": kind, "joining": joining, **figures})
    result = {
        "pair": pair,
        "machine": machine.about(),
        "max_tokens": max_tokens,
        "rows": found,
    }
    show(result, Console(width=max(Console().width, 120)))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
