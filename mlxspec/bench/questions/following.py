"""What a head costs that proposes nothing, but follows the text so that it may propose again.

    python -m mlxspec.bench following --pair demo-head

Plain rounds with a head and without take turns in pairs, on two texts of the same target. The share
is what the rounds with the head take more: the projection of the target's features into its past.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated

import typer
from rich.console import Console

from mlxspec.decode.alone import alone
from mlxspec.decode.engine import Engine
from mlxspec.decode.session import Session
from mlxspec.errors import UsageError
from mlxspec.measure.timing import begun
from mlxspec.pairs.loading import load

CONTEXT = 64  # tokens before the rounds
ROUNDS = 60  # of each text


def share(engine: Engine, name: str, *, texts: int, rounds: int = ROUNDS) -> list[float]:
    """What a plain round takes more with a head that follows: the median share of each text."""
    prompt = [token % engine.models[0].vocabulary for token in range(CONTEXT)]
    engines = [alone(engine, one, compiled=engine.compiles) for one in ("", name)]
    shares = []
    for _ in range(texts):
        sessions = [begun(one, prompt, draft_tokens=0) for one in engines]
        pairs = [[_round_s(one) for one in sessions] for _ in range(rounds)]
        shares.append(median([following / plain for plain, following in pairs]) - 1)
    return shares


def _round_s(session: Session) -> float:
    """Seconds of a round that follows on one of the same text."""
    session.step()  # what was in flight while the other text had its turn
    started = time.perf_counter()
    session.step()
    session.step()
    return (time.perf_counter() - started) / 2


def main(
    pair: Annotated[str, typer.Option(help="A pair of the table with a head.")] = "demo-head",
    texts: Annotated[int, typer.Option(min=1, help="Texts that are written twice.")] = 8,
) -> None:
    """Measure what a parked head costs."""
    console, engine = Console(), load(pair)
    if not engine.heads:
        raise UsageError(f"The pair {pair} has no head.", hint="Name one that has: demo-head.")
    for name in engine.heads:
        found = sorted(share(engine, name, texts=texts))
        console.print(
            f"{name}: {median(found):+.1%} of a plain round ({found[0]:+.1%} to {found[-1]:+.1%})"
        )
