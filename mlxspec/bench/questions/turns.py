"""How long a chat waits for the first token of an answer, turn by turn.

    python -m mlxspec.bench turns                     # the embedded pair, 20 turns
    python -m mlxspec.bench turns --target FOLDER --tokens 100 --json FILE

A question is a line, so that 20 turns are within the context. It is asked as `mlxspec chat` does,
with the conversation's past kept, and then once more with nothing kept: both in turn, so that a
busy machine slows both down.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlxspec.bench.prompt_sets import beginnings
from mlxspec.bench.questions.common import JsonFile, PairOption, write
from mlxspec.chat.conversation import Conversation, Turn
from mlxspec.chat.sending import Sending
from mlxspec.decode.engine import Engine
from mlxspec.decode.prefixes import PrefixCache
from mlxspec.defaults import AUTO, DEFAULT_PAIR, DraftTokens
from mlxspec.device import machine
from mlxspec.metrics import silent
from mlxspec.pairs.loading import load
from mlxspec.pairs.table import Pair, find_pair

CACHE_BYTES = 10**9  # as a chat has by default
ENDS = 5  # turns at the beginning and at the end that are compared


class Waited(NamedTuple):
    """One turn: tokens of its prompt, those that were read, and seconds to the first token.

    anew_s: with nothing kept, so that all of the prompt is read.
    """

    prompt: int
    read: int
    first_s: float
    anew_s: float


def waits(
    engine: Engine, questions: list[str], max_tokens: int, draft_tokens: DraftTokens = AUTO
) -> Iterator[Waited]:
    """Hold a conversation; its engine keeps the past from one turn to the next."""
    conversation, sending, cache = Conversation(None), Sending(engine, {}), PrefixCache(CACHE_BYTES)
    for question in questions:
        sending.fit(conversation, question, max_tokens, silent)
        options = sending.options(conversation, question)
        engine.prefixes = cache
        kept = engine.generate(
            **options, max_tokens=max_tokens, draft_tokens=draft_tokens, ignore_eos=True
        )
        engine.prefixes = None
        anew = engine.generate(**options, max_tokens=1, draft_tokens=0)
        conversation.add(Turn(question, kept.text or "…"))
        yield Waited(
            kept.prompt_tokens,
            kept.prompt_tokens - kept.cached_prompt_tokens,
            kept.timing.time_to_first_token_s,
            anew.timing.time_to_first_token_s,
        )


def summed_up(found: list[Waited]) -> dict[str, Any]:
    """The medians of the first turns and of the last; the very first of all has no past."""
    first, last = found[1 : 1 + ENDS], found[-ENDS:]
    medians = {
        name: [median(getattr(one, name) for one in part) for part in (first, last)]
        for name in ("first_s", "anew_s")
    }
    return {name: [round(value, 6) for value in values] for name, values in medians.items()}


def _show(found: list[Waited], sums: dict[str, Any], console: Console) -> None:
    table = Table("turn", "prompt", "read", "first token", "with nothing kept", box=None)
    for number, one in enumerate(found, 1):
        if number in (1, 2) or number % 5 == 0:
            times = f"{1e3 * one.first_s:.1f} ms", f"{1e3 * one.anew_s:.1f} ms"
            table.add_row(str(number), str(one.prompt), str(one.read), *times)
    console.print(table)
    for name, what in (("first_s", "first token"), ("anew_s", "with nothing kept")):
        early, late = sums[name]
        console.print(
            f"{what}: median {1e3 * early:.1f} ms of turns 2 to {1 + ENDS}, {1e3 * late:.1f} ms "
            f"of the last {ENDS}: {late / early:.2f} times as long"
        )


def main(
    pair: PairOption = DEFAULT_PAIR,
    target: Annotated[str | None, typer.Option(help="A target in place of a pair's.")] = None,
    turns: Annotated[int, typer.Option(min=7, help="Questions.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 24,
    draft_tokens: Annotated[int | None, typer.Option(min=0, help="K; auto by default.")] = None,
    output: JsonFile = None,
) -> None:
    """Measure the time to the first token of each turn of a chat."""
    chosen = find_pair(pair) if target is None else Pair(target, target)
    console, engine = Console(), load(chosen)
    count: DraftTokens = AUTO if draft_tokens is None else draft_tokens
    engine.build_kernels(draft_tokens=count)
    questions = [text.strip().partition("\n")[0] for text in beginnings("python")[:turns]]
    steps = waits(engine, questions, tokens, count)
    found = list(track(steps, "talking", total=turns, transient=True))
    sums = summed_up(found)
    _show(found, sums, console)
    about = {"machine": machine.about(), "pair": chosen.name, "tokens": tokens}
    rows = [one._asdict() for one in found]
    write(about | {"medians": sums, "turns": rows}, output)
