"""The time of a token with quantised weights, by the type of their scales, on random weights.

    python -m mlxspec.bench scales                # any machine, no download
    python -m mlxspec.bench scales --json FILE

On a Linux CPU, 16-bit scales make it many times as long; `mlxspec.models.scales` warns of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from mlx_lm.models.cache import make_prompt_cache
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlxspec.bench.questions.common import JsonFile, write
from mlxspec.device import machine
from mlxspec.measure.timing import in_turns
from mlxspec.models.caches.original import Model
from mlxspec.models.shapes import Shape, named

DTYPES = ("float32", "bfloat16", "float16")
BITS = (4, 8, 16)


def made(name: str, bits: int, dtype: str) -> Model:
    """A model of a built-in shape whose scales and activations have a type."""
    config = {**named(name, "").config, "dtype": dtype}
    return Shape(name, config, "" if bits == BITS[-1] else f"{bits}bit").made(1)


def token_s(model: Model) -> Callable[[], float]:
    """A callable that times a pass of mlx-lm's over one row, in seconds."""
    caches = make_prompt_cache(model)

    def step() -> float:
        started = time.perf_counter()
        mx.eval(model(mx.array([[1]]), cache=caches))
        return time.perf_counter() - started

    return step


def measure(shape: str, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a token by bits, where 16 are weights as they are, and type; in turns."""
    steps = {(bits, name): token_s(made(shape, bits, name)) for bits in BITS for name in DTYPES}
    times = in_turns(steps, repeats)
    return {str(bits): {name: 1e3 * median(times[bits, name]) for name in DTYPES} for bits in BITS}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the object that `--json` writes."""
    console.print(machine.described(result["machine"]))
    table = Table("bits of a weight", *DTYPES, box=SIMPLE_HEAD)
    for bits, row in result["token_ms"].items():
        first = row["float32"]
        cells = (f"{value:.2f} ms ({value / first:.1f} x)" for value in row.values())
        table.add_row("not quantised" if bits == "16" else bits, *cells)
    table.title = f"a token of {result['shape']}, by the type of scales and activations"
    console.print(table)


def main(
    shape: Annotated[str, typer.Option(help="Shape of the model.")] = "small-8",
    repeats: Annotated[int, typer.Option(min=1, help="Passes that are timed.")] = 7,
    output: JsonFile = None,
) -> None:
    """Time a token by the bits of weights and the type of their scales."""
    result = {
        "machine": machine.about(),
        "shape": shape,
        "token_ms": measure(shape, repeats),
    }
    show(result, Console())
    write(result, output)
