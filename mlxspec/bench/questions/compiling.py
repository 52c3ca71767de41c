"""What does compiling a round gain, what does it cost, and what does more room cost?

    python -m mlxspec.bench compiling
    python -m mlxspec.bench compiling --pair NAME --draft-tokens 5 --json FILE

A round is timed compiled, eagerly, and with four times the room in its caches, in turns. A new
length is traced once. On a CPU the first compiled round of a machine builds its kernels too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from statistics import median
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from mlxspec.bench.prompt_sets import beginnings
from mlxspec.bench.questions.common import JsonFile, PairOption, write
from mlxspec.bench.statistics import interval_of_ratio
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import GREEDY
from mlxspec.defaults import DEFAULT_PAIR
from mlxspec.device import kernels, machine
from mlxspec.measure.timing import in_turns, round_seconds
from mlxspec.pairs.loading import load

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


def measure(engine: Engine, prompt: list[int], count: int, repeats: int) -> dict[str, Any]:
    """Seconds of a round and of a trace, and ratios with their intervals."""
    models = engine.target, engine.draft, engine.tokenizer
    eager = Engine(*models, compiled=False)
    room = engine.prefilled(prompt).capacity
    times = in_turns(
        {
            "compiled": partial(round_seconds, engine, prompt, count, capacity=room),
            "eager": partial(round_seconds, eager, prompt, count, capacity=room),
            "roomy": partial(round_seconds, engine, prompt, count, capacity=4 * room),
        },
        repeats,
    )
    fresh, spent = Engine(*models, compiled=True), []
    for _ in range(2):
        started = time.perf_counter()
        fresh.session(prompt, draft_tokens=count, max_tokens=1).step()
        spent.append(time.perf_counter() - started)
    return {
        "round_s": {name: median(some) for name, some in times.items()},
        "eager_over_compiled": vars(interval_of_ratio(times["eager"], times["compiled"])),
        "at_four_times_the_room": vars(interval_of_ratio(times["roomy"], times["compiled"])),
        "trace_s": spent[0] - spent[1],
    }


def cold_kernels(pair: str, count: int) -> dict[str, float]:
    """How many kernels a first compiled round on a CPU builds, and the seconds it takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", COLD, pair, str(count)]
        environment = os.environ | {"TMPDIR": folder}
        done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    return cast(dict[str, float], json.loads(done.stdout))


def show(result: dict[str, Any], console: Console) -> None:
    """Print the object that `--json` writes."""
    console.print(machine.described(result["machine"]))
    ms = {name: f"{1e3 * seconds:.1f} ms" for name, seconds in result["round_s"].items()}
    eager, roomy = (
        "{median:.2f} ({low:.2f}–{high:.2f})".format(**result[name])
        for name in ("eager_over_compiled", "at_four_times_the_room")
    )
    console.print(
        f"a round at K = {result['draft_tokens']}: compiled {ms['compiled']}, "
        f"eager {ms['eager']}, {eager} times as long; with four times the room {ms['roomy']}, "
        f"{roomy} times as long; a new length is traced in {1e3 * result['trace_s']:.0f} ms"
    )
    if "cold_kernels" in result:
        console.print(
            f"on this CPU a first compiled round builds {result['cold_kernels']} kernels "
            f"in {result['cold_kernels_s']:.1f} s"
        )


def main(
    pair: PairOption = DEFAULT_PAIR,
    draft_tokens: Annotated[int, typer.Option(min=1, help="K of the rounds.")] = 3,
    repeats: Annotated[int, typer.Option(min=2, help="Turns.")] = 7,
    output: JsonFile = None,
) -> None:
    """Measure what compiling rounds gains and costs."""
    engine = load(pair, compiled=True)
    engine.build_kernels(GREEDY, draft_tokens)
    prompt = engine.encode(beginnings("python")[0])
    result = {
        "pair": pair,
        "machine": machine.about(),
        "draft_tokens": draft_tokens,
        **measure(engine, prompt, draft_tokens, repeats),
    }
    if kernels.on_cpu() and kernels.can_compile():
        result |= cold_kernels(pair, draft_tokens)
    show(result, Console())
    write(result, output)
