"""Long texts: the time per token as they grow, and the time to the first token.

    scripts/bench_long
    scripts/bench_long --repeats 5 --json FILE
    LD_PRELOAD=libopenblas.so.0 scripts/bench_long --no-prompts

Seconds per token are measured after a text whose past is made up: the caches hold random numbers
for all of its tokens, because attention takes as long for those. Time to the first token is
measured with real prompts, without a cache on disk, with one to be written, and with one to be
read. All contenders take turns; a median is quoted.

On a CPU the BLAS library multiplies several rows. MLX's wheel carries the reference library, with
which each row costs as much as the first; another can be preloaded. The time of MLX's attention
alone is shown beside.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import mlx.core as mx
import typer
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.dictated import Dictated
from mlxspec.decode.engine import Engine
from mlxspec.decode.reader import Reader
from mlxspec.decode.request import GREEDY, Request
from mlxspec.decode.session import Session
from mlxspec.decode.state import RoundState
from mlxspec.decode.track import Track
from mlxspec.defaults import AUTO, DEFAULT_PAIR, MAX_DRAFT_TOKENS
from mlxspec.device import lengths, machine
from mlxspec.drafters.graph import Past
from mlxspec.drafters.history import History
from mlxspec.errors import UsageError
from mlxspec.measure.timing import in_turns
from mlxspec.metrics import PrefillProgress
from mlxspec.models.caches.original import Model, fresh_cache
from mlxspec.models.prefill import CHUNK
from mlxspec.pairs.loading import load

LENGTHS = (1_000, 4_000, 16_000)
PROMPTS = (100, 1_000, 8_000)
DRAFTED = 3
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
        "mlxspec plain": ours(0),
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


def to_first_token(engine: Engine, prompt: list[int], folder: Path) -> dict[str, Timed]:
    """Timers, by name, of writing the first token after a prompt: seconds."""
    kept = folder / f"{len(prompt)}"

    def theirs() -> float:
        started = time.perf_counter()
        steps = generate_step(
            mx.array(prompt), engine.target, max_tokens=1, prefill_step_size=CHUNK
        )
        next(iter(steps))
        return time.perf_counter() - started

    def ours(cache: Path | None = None, *, fresh: bool = False, **options: Any) -> Timed:
        def run() -> float:
            if fresh and cache is not None:
                cache.unlink(missing_ok=True)
            started = time.perf_counter()
            session = engine.session(prompt, max_tokens=8, cache=cache, **options)
            session.step()
            seconds = time.perf_counter() - started
            while session.step().tokens:
                pass
            session.close()
            return seconds

        return run

    return {
        "mlx-lm plain": theirs,
        "mlxspec plain": ours(draft_tokens=0),
        "mlxspec": ours(),
        "mlxspec, cache to be written": ours(kept, fresh=True),
        "mlxspec, cache to be read": ours(kept),
    }


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


def reading(engine: Engine, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds to the first token, by the length of the prompt."""
    rng = random.Random(0)
    vocabulary = engine.models[0].vocabulary
    # A target without a limit to its context, for prompts longer than the embedded target's.
    endless = Engine(Dictated(engine.target, []), engine.draft, texts=(History,), compiled=True)
    first = {}
    with TemporaryDirectory() as folder:
        for length in track(PROMPTS, "reading", transient=True):
            prompt = [rng.randrange(vocabulary) for _ in range(length)]
            few = repeats if length < max(PROMPTS) else 1  # which takes minutes on a CPU
            first[str(length)] = medians(to_first_token(endless, prompt, Path(folder)), few)
    return first


def show(result: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    console.print(machine.described(result["machine"]))
    units = {
        "per_token_s": ("ms of a token, or of a round, behind a text of N tokens", LENGTHS),
        "first_token_s": ("ms to the first token after a prompt of N tokens", PROMPTS),
    }
    for key, (title, counts) in units.items():
        if key not in result:
            continue
        figures = result[key]
        table = Table("", *(f"{length:,}" for length in counts), box=SIMPLE_HEAD, title=title)
        for name in figures[str(counts[0])]:
            values = [figures[str(length)][name] for length in counts]
            base = [figures[str(length)]["mlxspec plain"] for length in counts]
            cells = [f"{1e3 * v:,.1f} ({v / b:.2f})" for v, b in zip(values, base, strict=True)]
            table.add_row(name, *cells)
        console.print(table)
    console.print("in brackets: over mlxspec's plain decoding")


def main(
    pair: Annotated[str, typer.Option(help="A pair of the table.")] = DEFAULT_PAIR,
    repeats: Annotated[int, typer.Option(min=1, help="Of everything.")] = 5,
    prompts: Annotated[bool, typer.Option(help="Time the first token too; takes minutes.")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure long texts and long prompts."""
    console = Console()
    engine = load(pair, compiled=True)
    engine.build_kernels(GREEDY, AUTO)
    engine.build_kernels(GREEDY, DRAFTED)
    result: dict[str, Any] = {"pair": pair, "repeats": repeats, "machine": machine.about()}
    result["per_token_s"] = growing(engine, repeats)
    if prompts:
        result["first_token_s"] = reading(engine, repeats)
    show(result, console)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
