"""One fused round against mlx-lm on the same weights, in one process, interleaved.

    scripts/bench_round                 # the embedded pair
    scripts/bench_round --pair NAME --max-tokens 128 --json FILE

Every contender decodes every prompt greedily to the same number of tokens; a speed is tokens per
second from the first token on, in ids only; a ratio is taken prompt by prompt and its median
quoted, because a machine's own speed drifts more than what is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import mlx.core as mx
import typer
from mlx_lm.generate import generate_step, speculative_generate_step
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.arms import Clock
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import GREEDY
from mlxspec.defaults import DEFAULT_PAIR
from mlxspec.device import kernels, machine
from mlxspec.errors import UsageError
from mlxspec.measure.timing import halves, round_seconds
from mlxspec.metrics import speed
from mlxspec.pairs.loading import load

COUNTS = range(1, 7)
PROMPTS = Path(__file__).resolve().parent / "held_out_prompts.json"

Decode = Callable[[], Iterable[int]]


def timed(tokens: Iterable[int]) -> tuple[list[int], float]:
    """All tokens, at least two, and tokens per second after the first."""
    seen, clock = [], Clock()
    for token in tokens:
        clock.add(1)
        seen.append(token)
    speed = clock.speed()
    assert speed is not None
    return seen, speed


def contenders(
    engine: Engine, prompt: list[int], max_tokens: int, counts: Iterable[int]
) -> dict[str, Decode]:
    """The decoders of `prompt`, by name: `plain`, `mlx-lm K`, `mlxspec 0` and `mlxspec K`."""
    array = mx.array(prompt, mx.uint32)
    draft = engine.draft
    if draft is None:
        raise UsageError("This pair has no draft.", hint="Choose one that has.")

    def plain() -> Iterable[int]:
        return (int(t) for t, _ in generate_step(array, engine.target, max_tokens=max_tokens))

    def theirs(count: int) -> Decode:
        return lambda: (
            int(token)
            for token, _, _ in speculative_generate_step(
                array, engine.target, draft, num_draft_tokens=count, max_tokens=max_tokens
            )
        )

    def ours(count: int) -> Decode:
        def decode() -> Iterable[int]:
            session = engine.session(prompt, max_tokens=max_tokens, draft_tokens=count)
            while tokens := session.step().tokens:
                yield from tokens

        return decode

    table: dict[str, Decode] = {"plain": plain, "mlxspec 0": ours(0)}
    for count in counts:
        table[f"mlx-lm {count}"] = theirs(count)
        table[f"mlxspec {count}"] = ours(count)
    return table


def race(engine: Engine, prompts: list[list[int]], max_tokens: int) -> dict[str, list[float]]:
    """Tokens per second of every contender on every prompt.

    Raises:
        RuntimeError: two contenders wrote different text.
    """
    speeds: dict[str, list[float]] = {}
    for warm, prompt in enumerate(track([prompts[0], *prompts], "decoding", transient=True)):
        texts: dict[str, list[int]] = {}
        for name, decode in contenders(engine, prompt, max_tokens, COUNTS).items():
            texts[name], speed = timed(decode())
            if warm:  # the first prompt warms up kernels, traces and buffers
                speeds.setdefault(name, []).append(speed)
        different = [name for name, text in texts.items() if text != texts["plain"]]
        if different:
            raise RuntimeError(f"{different} left mlx-lm's plain text on prompt {warm}")
    return speeds


def acceptance(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Acceptance rate and tokens per round for every K, over all prompts together."""
    rows = []
    for count in COUNTS:
        runs = [
            engine.generate(p, draft_tokens=count, max_tokens=max_tokens, ignore_eos=True)
            for p in prompts
        ]
        accepted = sum(run.speculation.accepted for run in runs)
        drafted = sum(run.speculation.drafted for run in runs)
        rows.append(
            {
                "draft_tokens": count,
                "acceptance_rate": accepted / drafted,
                "tokens_per_round": 1 + count * accepted / drafted,
            }
        )
    return rows


def against_parts(engine: Engine, prompt: list[int], count: int) -> dict[str, float]:
    """Ratios of a round's time: over its halves run back to back, and at four times the room."""
    over_parts, at_four_times = [], []
    for _ in range(8):
        room = engine.prefilled(prompt).capacity
        once = round_seconds(engine, prompt, count, capacity=room)
        four_times = round_seconds(engine, prompt, count, capacity=4 * room)
        session = engine.session(prompt, draft_tokens=count)
        for _ in range(8):
            session.step()
        over_parts.append(once / sum(halves(session, count, 30)))
        at_four_times.append(four_times / once)
    return {
        "over_its_parts": median(over_parts[1:]),
        "at_four_times_the_room": median(at_four_times[1:]),
    }


def compiling(engine: Engine, prompt: list[int], count: int) -> dict[str, float]:
    """Seconds of a compiled and of an eager round, and of tracing a new length."""
    eager = Engine(engine.target, engine.draft, engine.tokenizer, compiled=False)
    compiled_s, eager_s = [], []
    for _ in range(5):
        compiled_s.append(round_seconds(engine, prompt, count))
        eager_s.append(round_seconds(eager, prompt, count))
    fresh = Engine(engine.target, engine.draft, engine.tokenizer, compiled=True)
    started = time.perf_counter()
    fresh.session(prompt, draft_tokens=count, max_tokens=1).step()
    first_s = time.perf_counter() - started
    started = time.perf_counter()
    fresh.session(prompt, draft_tokens=count, max_tokens=1).step()
    return {
        "compiled_round_s": median(compiled_s),
        "eager_round_s": median(eager_s),
        "trace_s": first_s - (time.perf_counter() - started),
    }


COLD = """
import json, sys, time
from mlxspec import load
from mlxspec.device import kernels
from mlxspec.decode.engine import GREEDY
engine = load(sys.argv[1])
started = time.perf_counter()
engine.build_kernels(GREEDY, int(sys.argv[2]))
seconds = time.perf_counter() - started
print(json.dumps({"cold_kernels": kernels.count_built(), "cold_kernels_s": seconds}))
"""


def cold_kernels(pair: str, count: int) -> dict[str, float]:
    """How many kernels a first compiled round on a CPU builds, and the seconds it takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", COLD, pair, str(count)]
        environment = os.environ | {"TMPDIR": folder}
        done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    return cast(dict[str, float], json.loads(done.stdout))


def measure(engine: Engine, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """All figures as one object, as `--json` writes it."""
    speeds = race(engine, prompts, max_tokens)

    def ratio(name: str, base: str) -> float:
        return median(a / b for a, b in zip(speeds[name], speeds[base], strict=True))

    rates = acceptance(engine, prompts, max_tokens)
    rows = [
        {
            **rate,
            "tokens_per_second": median(speeds[f"mlxspec {count}"]),
            "over_mlx_lm_speculative": ratio(f"mlxspec {count}", f"mlx-lm {count}"),
            "over_mlx_lm_plain": ratio(f"mlxspec {count}", "plain"),
            "mlx_lm_speculative_over_plain": ratio(f"mlx-lm {count}", "plain"),
            **against_parts(engine, prompts[0], count),
        }
        for count, rate in zip(COUNTS, rates, strict=True)
    ]
    return {
        "machine": machine.about(),
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "mlx_lm_plain_tokens_per_second": median(speeds["plain"]),
        "mlxspec_plain_over_mlx_lm_plain": ratio("mlxspec 0", "plain"),
        "rounds": rows,
        "compiling": compiling(engine, prompts[0], 3),
        "speeds": speeds,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `measure` returned."""
    about = result["machine"]
    console.print(
        f"{machine.described(about)}; "
        f"{result['prompts']} prompts, {result['max_tokens']} tokens each, greedy, medians"
    )
    console.print(
        f"plain: mlx-lm {speed(result['mlx_lm_plain_tokens_per_second'])} tokens/s, "
        f"mlxspec {result['mlxspec_plain_over_mlx_lm_plain']:.2f} x that"
    )
    console.print(
        "/ plain, / mlx-lm: mlxspec's tokens/s over mlx-lm's, plain and speculative at the same K;"
        " / parts: a round over its halves back to back; 4 x room: over itself with larger caches"
    )
    columns = {
        "K": ("draft_tokens", "{}"),
        "acceptance": ("acceptance_rate", "{:.3f}"),
        "per round": ("tokens_per_round", "{:.2f}"),
        "tokens/s": ("tokens_per_second", "{}"),
        "/ plain": ("over_mlx_lm_plain", "{:.2f}"),
        "/ mlx-lm": ("over_mlx_lm_speculative", "{:.2f}"),
        "mlx-lm / plain": ("mlx_lm_speculative_over_plain", "{:.2f}"),
        "/ parts": ("over_its_parts", "{:.3f}"),
        "4 x room": ("at_four_times_the_room", "{:.3f}"),
    }
    table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1))
    for row in result["rounds"]:
        shown = row | {"tokens_per_second": speed(row["tokens_per_second"])}
        table.add_row(*(form.format(shown[key]) for key, form in columns.values()))
    console.print(table)
    cost = result["compiling"]
    console.print(
        f"a round at K = 3: compiled {1e3 * cost['compiled_round_s']:.1f} ms, "
        f"eager {1e3 * cost['eager_round_s']:.1f} ms; a new length is traced in "
        f"{1e3 * cost['trace_s']:.0f} ms"
    )
    if "cold_kernels" in cost:
        console.print(
            f"on this CPU a first compiled round builds {cost['cold_kernels']} kernels "
            f"in {cost['cold_kernels_s']:.1f} s"
        )


def main(
    pair: Annotated[str, typer.Option(help="A pair of the table.")] = DEFAULT_PAIR,
    prompts: Annotated[Path, typer.Option(help="JSON: a list of objects with `text`.")] = PROMPTS,
    count: Annotated[int, typer.Option(min=7, help="How many of the prompts.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=32, help="Tokens of each text.")] = 128,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Compare rounds with mlx-lm, plain and speculative, for K = 1 … 6."""
    console = Console()
    engine = load(pair, compiled=True)
    texts = [entry["text"] for entry in islice(json.loads(prompts.read_text()), count)]
    for draft_tokens in (0, *COUNTS):
        engine.build_kernels(GREEDY, draft_tokens)
    result = {"pair": pair, **measure(engine, [engine.encode(t) for t in texts], max_tokens)}
    if kernels.on_cpu() and kernels.can_compile():
        result["compiling"] |= cold_kernels(pair, 3)
    show(result, console)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
