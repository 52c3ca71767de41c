"""Every way to decode, side by side, for each kind of text: is speculation ever slower than none?

    scripts/bench_modes
    scripts/bench_modes --count 8 --max-tokens 200 --json FILE
    scripts/bench_modes --kind new --kind JSON

All contenders write the same greedy text after the same prompt, in turns. A speed is tokens per
second from the first token on; a ratio is taken prompt by prompt, and its median is quoted with the
interval that `statistics` gives for so few prompts. `auto` has all drafters and begins with
what it learned from earlier texts, `auto, cold` with nothing; `history` and `model` are that
drafter alone.

Copy-heavy texts, and one in which nothing repeats, are dictated: the embedded models write neither,
so the target is told what to write, and takes as long as ever. There is one text of each of these
kinds, which is decoded again and again.

The `ceiling` of `history` is its speed-up if all proposals were right, and `hindsight` is the one
if the number of right ones were known beforehand: both show what this machine's cost of several
rows allows.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.rounds import Decode, contenders, timed
from mlxspec.bench.statistics import interval_of_ratio
from mlxspec.bench.texts import Kind, kinds_of
from mlxspec.control.estimates import SIZES, Learned
from mlxspec.control.replay import along_text, shortest
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import GREEDY
from mlxspec.decode.round import FusedRound
from mlxspec.defaults import AUTO, DEFAULT_PAIR, MODEL
from mlxspec.device import lengths, machine
from mlxspec.drafters.history import History
from mlxspec.measure.timing import begun, halves, in_turns, round_seconds, stepper
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.layers import Layers
from mlxspec.pairs.loading import load
from mlxspec.sampling.sampler import Sampler

THEIR_DEFAULT = 3  # --num-draft-tokens of mlx_lm.generate
PROFILED, REPEATS = 4, 20


def modes(kind: Kind, prompt: list[int]) -> dict[str, Decode]:
    """All decoders of `prompt`, by name."""

    def auto(engine: Engine, *, cold: bool = False) -> Decode:
        def decode() -> Iterable[int]:
            learned = engine.learned
            engine.learned = Learned() if cold else learned
            session = engine.session(prompt, max_tokens=kind.max_tokens, draft_tokens=AUTO)
            while tokens := session.step().tokens:
                yield from tokens
            engine.learn_from(session)
            engine.learned = learned if cold else engine.learned

        return decode

    table = contenders(kind.entrants.auto, prompt, kind.max_tokens, kind.counts)
    alone = {name: auto(engine) for name, engine in kind.entrants._asdict().items()}
    return table | alone | {"auto, cold": auto(kind.entrants.auto, cold=True)}


def race(kind: Kind) -> tuple[dict[str, list[float]], list[list[int]]]:
    """Tokens per second of every contender on every prompt, and the texts that all wrote.

    Raises:
        RuntimeError: two of them wrote different texts.
    """
    speeds: dict[str, list[float]] = {}
    written = []
    for turn, prompt in enumerate([kind.prompts[0], *kind.prompts]):
        texts = {}
        table = list(modes(kind, prompt).items())
        random.Random(turn).shuffle(table)
        for name, decode in table:
            texts[name], speed = timed(decode())
            if turn:  # the first prompt is run once to warm up
                speeds.setdefault(name, []).append(speed)
        if different := [name for name, text in texts.items() if text != texts["plain"]]:
            raise RuntimeError(f"{different} left mlx-lm's plain text on prompt {turn}")
        written.append(texts["plain"])
    return speeds, written[1:]


def compared(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """The median ratio of two speeds, and its interval."""
    found = interval_of_ratio(over, under)
    return {"ratio": found.median, "low": found.low, "high": found.high}


def summed_up(speeds: dict[str, list[float]], counts: Iterable[int]) -> dict[str, Any]:
    """The figures by which kinds of text are compared: the best K, ratios, and speeds."""

    def best(name: str) -> str:
        return max((f"{name} {count}" for count in counts), key=lambda one: median(speeds[one]))

    theirs = best("mlx-lm")
    ours = max(best("mlxspec"), "mlxspec 0", key=lambda name: median(speeds[name]))
    pairs = {
        "auto / mlx-lm plain": ("auto", "plain"),
        "auto / mlxspec plain": ("auto", "mlxspec 0"),
        "auto / best fixed": ("auto", ours),
        "history / mlxspec plain": ("history", "mlxspec 0"),
        "model / mlxspec plain": ("model", "mlxspec 0"),
        "auto / mlx-lm default": ("auto", f"mlx-lm {THEIR_DEFAULT}"),
        "auto / mlx-lm best": ("auto", theirs),
        "cold / mlxspec plain": ("auto, cold", "mlxspec 0"),
        "cold / best fixed": ("auto, cold", ours),
        "mlx-lm best / plain": (theirs, "plain"),
    }
    ratios = {name: compared(speeds[a], speeds[b]) for name, (a, b) in pairs.items()}
    return {"best_fixed": ours, "mlx_lm_best": theirs, "ratios": ratios, "speeds": speeds}


def profile(engine: Engine, prompt: list[int], count: int) -> dict[str, float]:
    """Milliseconds of a round, of its halves, and of the models' passes alone, each waited for.

    The halves without the passes are sampling and the verdict; a round without its halves is the
    host's time, less what overlaps with it.
    """
    session = begun(engine, prompt, draft_tokens=count)
    draft_s, verify_s = halves(session, count, REPEATS)
    state, length = session.ahead(1)
    target, draft = engine.models
    read = state.drafts[MODEL].layers

    def alone(cached: CachedModel, layers: Layers, rows: int) -> float:
        def forward(tokens: mx.array, layers: Layers, offset: mx.array) -> mx.array:
            return cached.forward(tokens, layers, offset, length)[0]

        compiled = mx.compile(forward)
        times = []
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            mx.eval(compiled(mx.zeros((1, rows), mx.int32), layers, state.position))
            times.append(time.perf_counter() - started)
        return median(times[1:])

    bare = {
        "draft_passes": alone(draft, read, 2) + (count - 1) * alone(draft, read, 1),
        "target_pass": alone(target, state.target, count + 1),
    }
    parts = {"round": round_seconds(engine, prompt, count), "draft": draft_s, "verify": verify_s}
    return {name: 1e3 * seconds for name, seconds in (parts | bare).items()}


def figures_of(kind: Kind) -> dict[str, Any]:
    """All figures of a kind of text."""
    speeds, texts = race(kind)
    seconds = costs(kind)
    hindsight = []
    for prompt, text in zip(kind.prompts, texts, strict=True):
        places = along_text(History(), prompt, text)
        hindsight.append(len(text) * seconds[0] / shortest(places, seconds))
    return summed_up(speeds, kind.counts) | {
        "max_tokens": kind.max_tokens,
        "ceiling": max((size + 1) * seconds[0] / seconds[size] for size in SIZES),
        "hindsight": median(hindsight),
    }


def costs(kind: Kind) -> dict[int, float]:
    """Seconds of a round, by the number of proposals from the text that it verifies.

    Rounds with proposals are waited for; of plain rounds, 0, the next one is always in flight.
    """
    engine, prompt = kind.entrants.history, kind.prompts[0]
    sampler = Sampler(GREEDY.method(), engine.models[0].vocabulary)
    rounds = FusedRound(engine.models[0], {}, sampler, compiled=True)
    length = lengths.attended(len(prompt) + SIZES[-1] + 1)

    def verifying(size: int) -> Callable[[], float]:
        return stepper(rounds, engine.prefilled(prompt, capacity=length), size, length)

    steps = {size: verifying(size) for size in SIZES}
    steps[0] = partial(round_seconds, engine, prompt, 0)
    return {size: median(some) for size, some in in_turns(steps).items()}


def show(result: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    console.print(
        f"{machine.described(result['machine'])}; {result['prompts']} prompts of each kind, "
        "greedy; medians and 95% intervals"
    )
    kinds = result["kinds"]
    table = Table("", *kinds, box=SIMPLE_HEAD, padding=(0, 1))
    table.add_row("tokens", *(str(kinds[kind]["max_tokens"]) for kind in kinds))
    table.add_row("best fixed K", *(kinds[kind]["best_fixed"].split()[1] for kind in kinds))
    table.add_row("mlx-lm's best K", *(kinds[kind]["mlx_lm_best"].split()[1] for kind in kinds))
    for name in ("ceiling", "hindsight"):
        table.add_row(f"{name} of history", *(f"{kinds[kind][name]:.2f}" for kind in kinds))
    for name in next(iter(kinds.values()))["ratios"]:
        cells = (kinds[kind]["ratios"][name] for kind in kinds)
        table.add_row(name, *(f"{c['ratio']:.2f} ({c['low']:.2f}–{c['high']:.2f})" for c in cells))
    console.print(table)
    spent = {name: f"{ms:.1f}" for name, ms in result["profile_ms"].items()}
    console.print(
        f"a round at K = {PROFILED}: {spent['round']} ms; "
        f"drafting {spent['draft']}, of which passes {spent['draft_passes']}; "
        f"verifying {spent['verify']}, of which the pass {spent['target_pass']}"
    )


def main(
    pair: Annotated[str, typer.Option(help="A pair of the table.")] = DEFAULT_PAIR,
    count: Annotated[int, typer.Option(min=2, max=8, help="Prompts of each kind.")] = 6,
    max_tokens: Annotated[int, typer.Option(min=32, help="Tokens of each text.")] = 200,
    copied: Annotated[
        int, typer.Option("--copy-tokens", min=32, help="Tokens of each dictated text.")
    ] = 400,
    only: Annotated[list[str] | None, typer.Option("--kind", help="This kind; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Compare every way to decode, for each kind of text."""
    console = Console()
    engine = load(pair, compiled=True)
    engine.build_kernels(GREEDY, AUTO)
    kinds = kinds_of(engine, count, max_tokens, copied)
    prompt = kinds["code"].prompts[0]
    if only:
        if unknown := set(only) - set(kinds):
            raise typer.BadParameter(f"{', '.join(unknown)} is none of {', '.join(kinds)}.")
        kinds = {name: kinds[name] for name in only}
    figures = {
        name: figures_of(kind) for name, kind in track(kinds.items(), "decoding", transient=True)
    }
    result = {
        "pair": pair,
        "machine": machine.about(),
        "prompts": count,
        "kinds": figures,
        "profile_ms": profile(engine, prompt, PROFILED),
    }
    show(result, console)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
