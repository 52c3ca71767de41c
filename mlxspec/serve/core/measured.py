"""The rounds of this machine, timed once before the first request."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from mlxspec.decode.engine import Engine
from mlxspec.defaults import MAX_AUTO_TOKENS
from mlxspec.measure.timing import begun, halves, round_seconds

PROMPT = [0] * 16  # what a round takes does not depend on the text
ROUNDS, REPEATS = 12, 3


class Halves(NamedTuple):
    """Median seconds of the draft's steps in one round, and of the target's pass over them."""

    draft_s: float
    verify_s: float


@dataclass(frozen=True)
class Measured:
    """Median seconds of rounds that each run alone.

    Args:
        plain_s: of a plain round, which writes one token.
        halves: of rounds with a draft model, by K; empty without one.
    """

    plain_s: float
    halves: Mapping[int, Halves] = field(default_factory=dict)


def measure(engine: Engine) -> Measured:
    """Time rounds, which also builds what the first text would have waited for."""
    plain_s = round_seconds(engine, PROMPT, 0, rounds=ROUNDS)
    with closing(begun(engine, PROMPT, draft_tokens=MAX_AUTO_TOKENS)) as session:
        counts = range(1, MAX_AUTO_TOKENS + 1) if session.drafted else ()
        by_count = {
            count: Halves(*halves(session, count, REPEATS, session.drafted[0])) for count in counts
        }
    return Measured(plain_s, by_count)
