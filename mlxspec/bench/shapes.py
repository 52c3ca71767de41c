"""Rounds on random weights of a real model's shape, beside mlx-lm: no download, any machine.

    python -m mlxspec.bench.shapes             # an 8B target and a 1B draft in 4 bits
    python -m mlxspec.bench.shapes --target small-8 --draft small-1 --json FILE

Random weights of two models never agree, so a round commits one token, and its time is what a
rejected proposal costs. Before that the embedded pair's greedy text is held against mlx-lm's plain
decoding, for every K and with the coupled rule over K, compiled and eager.
"""

from __future__ import annotations

import json
import time
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mlxspec.decode.engine import Engine
from mlxspec.device import machine
from mlxspec.errors import UsageError
from mlxspec.models.caches.original import Model
from mlxspec.pairs.loading import load
from mlxspec.params import SamplingParams

COUNTS = (0, 1, 3, 5, 7)
PROMPT = [(37 * i + 11) % 2000 for i in range(256)]
ROUNDS = 40
TEXTS = (
    "def fibonacci(n):\n",
    "class Stack:\n    def push(self, item):\n",
    "import os\nimport sys\n\ndef main():\n",
)


class Shape(NamedTuple):
    """The size of a Llama model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int


SHAPES = {
    "llama-8b": Shape(4096, 32, 14336, 32, 8, 128, 128_256),
    "llama-1b": Shape(2048, 16, 8192, 32, 8, 64, 128_256),
    "small-8": Shape(256, 4, 704, 4, 2, 64, 2048),
    "small-1": Shape(128, 1, 320, 2, 1, 64, 2048),
}


def model_of(shape: Shape, bits: int, seed: int, dtype: mx.Dtype = mx.bfloat16) -> Model:
    """A Llama model with random weights of `dtype`, quantised to `bits` unless that is 16."""
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            head_dim=shape.head_dim,
            rms_norm_eps=1e-5,
            vocab_size=shape.vocabulary,
            max_position_embeddings=131_072,
            tie_word_embeddings=True,
        )
    )
    model.set_dtype(dtype)
    if bits != 16:
        nn.quantize(model, group_size=64, bits=bits)
    model.eval()
    mx.eval(model.parameters())
    return model


def theirs(target: Model, draft: Model, count: int) -> float:
    """Seconds of a round of mlx-lm's, after the first."""
    prompt = mx.array(PROMPT)
    if count == 0:
        plain = generate_step(prompt, target, max_tokens=ROUNDS)
        ends = [time.perf_counter() for _ in plain]
    else:
        steps = speculative_generate_step(
            prompt, target, draft, num_draft_tokens=count, max_tokens=ROUNDS
        )
        ends = [time.perf_counter() for _, _, from_draft in steps if not from_draft]
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def ours(engine: Engine, count: int) -> float:
    """Seconds of a fused round, after the first three."""
    session = engine.session(PROMPT, max_tokens=ROUNDS, draft_tokens=count)
    for _ in range(3):
        session.step()
    started, rounds = time.perf_counter(), 0
    while session.step().tokens:
        rounds += 1
    return (time.perf_counter() - started) / rounds


def rounds(target: Model, draft: Model, repeats: int) -> list[dict[str, float]]:
    """Medians for every K, mlx-lm and mlxspec in turns; the first turn warms up."""
    engine, rows = Engine(target, draft, compiled=True), []
    for count in COUNTS:
        pairs = [(theirs(target, draft, count), ours(engine, count)) for _ in range(repeats + 1)]
        rows.append(
            {
                "draft_tokens": count,
                "mlx_lm_ms": 1e3 * median(one for one, _ in pairs[1:]),
                "mlxspec_ms": 1e3 * median(other for _, other in pairs[1:]),
                "mlx_lm_over_mlxspec": median(one / other for one, other in pairs[1:]),
            }
        )
    return rows


def exactness() -> dict[str, str]:
    """How many texts of the embedded pair are the ones that they have to be."""
    engines = [load("demo", compiled=compiled) for compiled in (True, False)]
    target = engines[0].target
    warm = SamplingParams(temperature=0.8, seed=5, verify="coupled")
    greedy, coupled = [], []
    for text in TEXTS:
        prompt = engines[0].encode(text)
        steps = generate_step(mx.array(prompt), target, max_tokens=96)
        plain = [int(token) for token, _ in islice(steps, 96)]
        for engine, count in product(engines, (0, 1, 3, 5, 8)):
            request = engine.request(prompt, max_tokens=96, draft_tokens=count, ignore_eos=True)
            greedy.append(engine.generate(request).tokens == plain)
        options = {"max_tokens": 48, "sampling": warm, "ignore_eos": True}
        texts = [
            engines[0].generate(prompt, draft_tokens=count, **options).tokens for count in (0, 2, 6)
        ]
        coupled.append(texts[0] == texts[1] == texts[2])
    return {
        "greedy_identical": f"{sum(greedy)} of {len(greedy)}",
        "coupled_identical": f"{sum(coupled)} of {len(coupled)}",
    }


def shape_of(name: str) -> Shape:
    if name not in SHAPES:
        raise UsageError(f"There is no shape {name!r}.", hint=f"Choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def show(result: dict[str, Any], console: Console) -> None:
    """Print the object that `--json` writes."""
    console.print(machine.described(result["machine"]))
    console.print(
        f"texts that are identical: greedy {result['exact']['greedy_identical']}, "
        f"coupled {result['exact']['coupled_identical']}"
    )
    table = Table("K", "mlx-lm ms", "mlxspec ms", "mlx-lm / mlxspec", box=SIMPLE_HEAD)
    for row in result["rounds"]:
        count, *times = row.values()
        table.add_row(str(count), *(f"{value:.2f}" for value in times))
    table.title = f"a round, {result['target']} with {result['draft']} in {result['bits']} bits"
    console.print(table)


def main(
    target: Annotated[str, typer.Option(help="Shape of the target.")] = "llama-8b",
    draft: Annotated[str, typer.Option(help="Shape of the draft.")] = "llama-1b",
    bits: Annotated[int, typer.Option(help="Bits of a weight: 4, 8 or 16.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Counted turns.")] = 3,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Compare rounds on random weights with mlx-lm's, and check the embedded pair's texts."""
    shapes = shape_of(target), shape_of(draft)
    models = [model_of(shape, bits, seed) for seed, shape in enumerate(shapes, 1)]
    result = {
        "machine": machine.about(),
        "exact": exactness(),
        "target": target,
        "draft": draft,
        "bits": bits,
        "rounds": rounds(models[0], models[1], repeats),
    }
    show(result, Console())
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
