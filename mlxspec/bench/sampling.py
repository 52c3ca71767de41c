"""Sampled speculation: tokens per round of every rule beside mlx-lm's, and their bound.

    scripts/bench_sampling                 # the embedded pair at temperature 1
    scripts/bench_sampling --pair NAME --temp 0.7 --count 32 --json FILE

mlx-lm samples the target and keeps a proposal that is equal to the sample. An exact rule can keep
i tokens at most as often as E[min(1, Πⱼ≤ᵢ p(xⱼ)/q(xⱼ))] over the draft's x, the overlap Σ min(p, q)
of the two distributions of i tokens (Sun et al., arXiv 2403.10444, theorem 2); their sum bounds
the tokens of a round. Contenders decode every prompt in turn; a ratio of speeds is taken prompt by
prompt and its median quoted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import mlx.core as mx
import typer
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.sample_utils import make_sampler
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.rounds import COUNTS, PROMPTS, timed
from mlxspec.decode.engine import Engine
from mlxspec.decode.reader import Reader
from mlxspec.decode.round import FusedRound
from mlxspec.decode.session import Session
from mlxspec.decode.state import RoundState
from mlxspec.decode.track import Track
from mlxspec.defaults import DEFAULT_PAIR, MODEL
from mlxspec.device import machine
from mlxspec.drafters.graph import ModelDrafter
from mlxspec.errors import UsageError
from mlxspec.metrics import speed
from mlxspec.pairs.loading import load
from mlxspec.params import SamplingParams, Verify
from mlxspec.sampling.sampler import Sampler
from mlxspec.sampling.verify import Draft, Rule, Verdict, log_ratio

RULES: tuple[Verify, ...] = ("token", "block", "coupled")


@dataclass
class Tally:
    """The speeds and counts of one contender over all prompts."""

    speeds: list[float] = field(default_factory=list)
    kept: int = 0
    rounds: int = 0

    def per_round(self) -> float:
        return 1 + self.kept / self.rounds

    def acceptance(self, draft_tokens: int) -> float:
        return self.kept / (draft_tokens * self.rounds)


Decode = Callable[[Tally], Iterable[int]]


def contenders(
    engine: Engine, prompt: list[int], max_tokens: int, temperature: float, seed: int
) -> dict[str, Decode]:
    """The decoders of `prompt`: `plain`, `mlx-lm K` and `RULE K`; each counts its rounds."""
    array, draft = mx.array(prompt, mx.uint32), engine.draft
    if draft is None:
        raise UsageError("This pair has no draft.", hint="Choose one that has.")
    sampler = make_sampler(temperature)

    def plain(_: Tally) -> Iterable[int]:
        steps = generate_step(array, engine.target, max_tokens=max_tokens, sampler=sampler)
        return (int(token) for token, _ in steps)

    def theirs(count: int) -> Decode:
        """Rounds of mlx-lm: every token that is not the draft's ends one."""

        def decode(tally: Tally) -> Iterable[int]:
            for token, _, from_draft in speculative_generate_step(
                array,
                engine.target,
                draft,
                num_draft_tokens=count,
                max_tokens=max_tokens,
                sampler=sampler,
            ):
                tally.kept += from_draft
                tally.rounds += not from_draft
                yield int(token)

        return decode

    def ours(rule: Verify, count: int) -> Decode:
        """Rounds of `rule`; one that the end of the text cut short does not count."""
        sampling = SamplingParams(temperature=temperature, seed=seed, verify=rule)

        def decode(tally: Tally) -> Iterable[int]:
            session = engine.session(
                prompt, max_tokens=max_tokens, draft_tokens=count, sampling=sampling
            )
            while stats := (committed := session.step()).stats:
                if stats.full and stats.drafted:
                    tally.kept += stats.accepted
                    tally.rounds += 1
                yield from committed.tokens

        return decode

    table: dict[str, Decode] = {"plain": plain}
    for count in COUNTS:
        table[f"mlx-lm {count}"] = theirs(count)
        table |= {f"{rule} {count}": ours(rule, count) for rule in RULES}
    return table


def race(
    engine: Engine, prompts: list[list[int]], max_tokens: int, temperature: float
) -> dict[str, Tally]:
    """Decode every prompt with every contender."""
    tallies: dict[str, Tally] = {}
    mx.random.seed(0)
    for turn, prompt in enumerate(track([prompts[0], *prompts], "decoding", transient=True)):
        for name, decode in contenders(engine, prompt, max_tokens, temperature, turn).items():
            if turn == 0:  # the first prompt warms up kernels, traces and buffers
                timed(decode(Tally()))
                continue
            tally = tallies.setdefault(name, Tally())
            _, speed = timed(decode(tally))
            tally.speeds.append(speed)
    return tallies


class Watched(FusedRound):
    """Eager rounds that keep, for every proposal, log min(1, Π p/q) after each of its tokens."""

    overlaps: list[mx.array]

    def _tested(self, rule: Rule, log_p: mx.array, draft: Draft, state: RoundState) -> Verdict:
        if draft.tokens.size:
            self.overlaps.append(mx.minimum(mx.cumsum(log_ratio(log_p, draft), axis=-1), 0))
        return super()._tested(rule, log_p, draft, state)


def overlaps(
    engine: Engine, prompts: list[list[int]], max_tokens: int, temperature: float
) -> list[float]:
    """How often an exact rule could keep 1, 2, … tokens: estimated along sampled texts."""
    method = SamplingParams(temperature=temperature, verify="block").method()
    target, draft = engine.models
    sampler = Sampler(method, target.vocabulary)
    drafters = {MODEL: ModelDrafter(draft, target.vocabulary)}
    watched = Watched(target, drafters, sampler, compiled=False)
    watched.overlaps = []
    for seed, prompt in enumerate(track(prompts, "overlap", transient=True)):
        sampling = SamplingParams(temperature=temperature, seed=seed)
        request = engine.request(
            prompt, max_tokens=max_tokens, draft_tokens=max(COUNTS), sampling=sampling
        )
        session = Session(watched, Track(watched, Reader(watched, request), request))
        while session.step().tokens:
            pass
    means = mx.mean(mx.exp(mx.concatenate(watched.overlaps)), axis=0)
    return [float(mean) for mean in cast(list[float], means.tolist())]


def measure(
    engine: Engine, prompts: list[list[int]], max_tokens: int, temperature: float
) -> dict[str, Any]:
    """All figures as one object, as `--json` writes it."""
    tallies = race(engine, prompts, max_tokens, temperature)
    kept = overlaps(engine, prompts, max_tokens, temperature)

    def ratio(name: str, base: str) -> float:
        pairs = zip(tallies[name].speeds, tallies[base].speeds, strict=True)
        return median(a / b for a, b in pairs)

    rows = []
    for count in COUNTS:
        names = {rule: f"{rule} {count}" for rule in ("mlx-lm", *RULES)}
        rows.append(
            {
                "draft_tokens": count,
                "bound": 1 + sum(kept[:count]),
                "acceptance_rate": {r: tallies[n].acceptance(count) for r, n in names.items()},
                "tokens_per_round": {r: tallies[n].per_round() for r, n in names.items()},
                "tokens_per_second": {r: median(tallies[n].speeds) for r, n in names.items()},
                "over_mlx_lm_speculative": {
                    rule: ratio(names[rule], names["mlx-lm"]) for rule in RULES
                },
                "over_mlx_lm_plain": {r: ratio(n, "plain") for r, n in names.items()},
            }
        )
    return {
        "machine": machine.about(),
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "mlx_lm_plain_tokens_per_second": median(tallies["plain"].speeds),
        "rounds": rows,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print what `measure` returned."""
    about = result["machine"]
    console.print(
        f"{machine.described(about)}; "
        f"{result['prompts']} prompts, {result['max_tokens']} tokens each, "
        f"temperature {result['temperature']:g}, median speeds"
    )
    columns = ["mlx-lm", *RULES]
    titles = {
        "tokens_per_round": "tokens per round; bound: what no exact rule can exceed",
        "acceptance_rate": "acceptance rate",
        "tokens_per_second": "tokens per second",
        "over_mlx_lm_plain": "tokens per second over mlx-lm's plain decoding",
    }
    forms = {"tokens_per_second": speed, "acceptance_rate": "{:.3f}".format}
    for key, title in titles.items():
        bounded = key == "tokens_per_round"
        extra = ["bound", "block / mlx-lm"] if bounded else []
        table = Table("K", *columns, *extra, box=SIMPLE_HEAD, padding=(0, 1), title=title)
        for row in result["rounds"]:
            cells = [forms.get(key, "{:.2f}".format)(row[key][column]) for column in columns]
            if bounded:
                over = row[key]["block"] / row[key]["mlx-lm"]
                cells += [f"{row['bound']:.2f}", f"{over:.2f}"]
            table.add_row(str(row["draft_tokens"]), *cells)
        console.print(table)


def main(
    pair: Annotated[str, typer.Option(help="A pair of the table.")] = DEFAULT_PAIR,
    prompts: Annotated[Path, typer.Option(help="JSON: a list of objects with `text`.")] = PROMPTS,
    count: Annotated[int, typer.Option(min=1, help="How many of the prompts.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=32, help="Tokens of each text.")] = 128,
    temperature: Annotated[float, typer.Option("--temp", min=0.01, help="Above 0.")] = 1.0,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Compare the rules with mlx-lm's, for K = 1 … 6."""
    engine = load(pair, compiled=True)
    texts = [entry["text"] for entry in islice(json.loads(prompts.read_text()), count)]
    for rule in RULES:
        for draft_tokens in (1, 2):
            engine.build_kernels(SamplingParams(temperature=1.0, verify=rule), draft_tokens)
    tokens = [engine.encode(text) for text in texts]
    result = {"pair": pair, **measure(engine, tokens, max_tokens, temperature)}
    show(result, Console())
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
