"""How much longer is a token, or a round, behind a long text?

    python -m mlxspec.bench long
    LD_PRELOAD=libopenblas.so.0 python -m mlxspec.bench long --repeats 3 --json FILE

`mlxspec bench --contexts` lets a model read long prompts; here the past is made up, so that a text
may be longer than the model's context, and than a CPU could read in an hour: the caches hold random
numbers for all tokens, because attention takes as long for those. All contenders take turns; a
median is quoted.

On a CPU the BLAS library multiplies several rows. MLX's wheel carries the reference library, with
which each row costs as much as the first; another can be preloaded. The time of MLX's attention
alone is shown beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.questions.common import JsonFile, PairOption, write
from mlxspec.decode.engine import Engine
from mlxspec.decode.reader import Reader
from mlxspec.decode.request import GREEDY, Request
from mlxspec.decode.session import Session
from mlxspec.decode.state import RoundState
from mlxspec.decode.track import Track
from mlxspec.defaults import DEFAULT_PAIR, MAX_DRAFT_TOKENS
from mlxspec.device import lengths, machine
from mlxspec.drafters.graph import Past
from mlxspec.errors import UsageError
from mlxspec.measure.timing import in_turns
from mlxspec.metrics import PrefillProgress
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.pairs.loading import load

LENGTHS = (1_000, 4_000, 16_000)
DRAFTED = 3
PLAIN = "mlxspec plain"
STEPS = 24  # rounds or tokens that are timed, after two that are not

Timed = Callable[[], float]


def made_up(model: Model, length: int) -> list[Any]:
    """mlx-lm's caches as if `length` tokens had been read.

    Raises:
        UsageError: a cache is not one of full attention.
    """
    caches = fresh_cache(model, None)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    for cache in caches:
        if type(cache) is not KVCache or cache.keys is None:
            raise UsageError(
                f"There is no made-up past for {type(cache).__name__}.",
                hint="Choose a pair of models with full attention.",
            )
        shape = (*cache.keys.shape[:2], length, cache.keys.shape[3])
        keys, values = (mx.random.normal(shape).astype(cache.keys.dtype) for _ in range(2))
        cache.state = keys, values, length
    mx.eval([cache.state for cache in caches])
    return caches


class MadeUp(Reader):
    """A reader that makes caches up in place of reading."""

    def state(
        self, tokens: Sequence[int], *, beside: bool = False
    ) -> Generator[PrefillProgress, None, RoundState]:
        few = yield from super().state(tokens[-2:])
        read = len(tokens) - 1
        room = lengths.attended(len(tokens) + (STEPS + 4) * (DRAFTED + 1))
        layers = self._target.adopt(made_up(self._target.model, read), read, room)
        return few._replace(position=mx.array([read], mx.int32), target=layers)

    def draft(
        self, name: str, tokens: Sequence[int], start: int, *, at_once: bool = True
    ) -> Generator[PrefillProgress, None, Past]:
        cached, read = self._rounds.model(name).cached, len(tokens)
        layers = cached.adopt(made_up(cached.model, read), read, read + MAX_DRAFT_TOKENS)
        yield from ()
        return Past(layers, mx.array([start], mx.int32))


def per_token(engine: Engine, length: int) -> dict[str, Timed]:
    """Timers, by name, of decoding after `length` tokens: seconds per token or round."""
    text = [i % 100 for i in range(length)]

    def plain() -> float:
        steps = generate_step(
            mx.array(text[-1:]),
            engine.target,
            max_tokens=STEPS + 2,
            prompt_cache=made_up(engine.target, length),
        )
        moments = [time.perf_counter() for _ in steps]
        return (moments[-1] - moments[1]) / STEPS

    def ours(draft_tokens: int) -> Timed:
        def run() -> float:
            # Made by hand, because `engine.request` rejects a text beyond the model's context.
            request = Request(tokens=tuple(text), draft_tokens=draft_tokens)
            rounds = engine.rounds.of(request)
            session = Session(rounds, Track(rounds, MadeUp(rounds, request), request))
            for _ in range(3):
                session.step()
            started = time.perf_counter()
            for _ in range(STEPS):
                session.step()
            return (time.perf_counter() - started) / STEPS

        return run

    return {
        "mlx-lm plain": plain,
        PLAIN: ours(0),
        "of it attention": attending(engine.target, length, 1),
        f"round of {DRAFTED}": ours(DRAFTED),
        "of it the target's attention": attending(engine.target, length, DRAFTED + 1),
    }


def attending(model: Model, length: int, rows: int) -> Timed:
    """A timer of MLX's attention alone, in all layers of a pass over `rows` rows."""
    heads = model.args.num_attention_heads

    def run() -> float:
        layers = [cache.state[:2] for cache in made_up(model, length)]
        queries = [mx.random.normal((1, heads, rows, keys.shape[-1])) for keys, _ in layers]
        mx.eval(queries)
        started = time.perf_counter()
        for query, (keys, values) in zip(queries, layers, strict=True):
            mx.eval(mx.fast.scaled_dot_product_attention(query, keys, values, scale=1.0))
        return time.perf_counter() - started

    return run


def medians(table: dict[str, Timed], repeats: int) -> dict[str, float]:
    """Median seconds, by name, after one warm-up turn unless `repeats` is 1."""
    times = in_turns(table, repeats, warm_up=repeats > 1)
    return {name: median(some) for name, some in times.items()}


def growing(engine: Engine, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of a token, or of a round, by the length of the text."""
    return {
        str(length): medians(per_token(engine, length), repeats)
        for length in track(LENGTHS, "growing", transient=True)
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    console.print(machine.described(result["machine"]))
    figures = result["per_token_s"]
    title = "ms of a token, or of a round, behind a text of N tokens"
    table = Table("", *(f"{length:,}" for length in LENGTHS), box=SIMPLE_HEAD, title=title)
    columns = [figures[str(length)] for length in LENGTHS]
    for name in columns[0]:
        cells = (f"{1e3 * one[name]:,.1f} ({one[name] / one[PLAIN]:.2f})" for one in columns)
        table.add_row(name, *cells)
    console.print(table)
    console.print("in brackets: over mlxspec's plain decoding")


def main(
    pair: PairOption = DEFAULT_PAIR,
    repeats: Annotated[int, typer.Option(min=1, help="Of everything.")] = 5,
    output: JsonFile = None,
) -> None:
    """Measure the time per token as texts grow."""
    engine = load(pair, compiled=True)
    engine.build_kernels(GREEDY, DRAFTED)
    result: dict[str, Any] = {"pair": pair, "repeats": repeats, "machine": machine.about()}
    result["per_token_s"] = growing(engine, repeats)
    show(result, Console())
    write(result, output)
