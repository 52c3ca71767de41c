"""Where a round's time goes, measured on the models and caches of a session."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import mlx.core as mx

from mlxspec.decode.engine import Engine
from mlxspec.decode.session import Session
from mlxspec.defaults import MODEL
from mlxspec.metrics import Split

SLOW_ROUND_S = 0.05
ROUNDS = 30  # rounds of a running text that are timed


def measure_split(session: Session, mean_s: float) -> Split | None:
    """Run a few rounds in two halves, each waited for, and compare with the time of a round.

    The time outside both halves is the host's: building graphs, and text. With compiled rounds it
    includes tracing new lengths. The session can go on afterwards.

    Args:
        mean_s: mean seconds of a round during the generation. If the policy has an estimate for
            the rounds that it settled on, the estimate is used instead.

    Returns:
        None where no model drafted, or no round was run.
    """
    choice = session.policy.current
    drafter, count = choice.drafter, min(choice.draft_tokens, session.draft_tokens)
    round_s = session.policy.seconds(choice) or mean_s
    if count == 0 or round_s <= 0 or drafter not in session.drafted:
        return None
    repeats = 1 if round_s > SLOW_ROUND_S else 5
    draft_s, verify_s = halves(session, count, repeats, drafter)
    whole = max(round_s, draft_s + verify_s)
    return Split(
        draft=draft_s / whole,
        verify=verify_s / whole,
        host=1 - (draft_s + verify_s) / whole,
    )


def halves(
    session: Session, draft_tokens: int, repeats: int, drafter: str = MODEL
) -> tuple[float, float]:
    """Median seconds of K draft steps and of one verification, each run alone and waited for."""
    state, length = session.ahead(repeats + 1, draft_tokens)
    propose, commit = session.rounds.halves(draft_tokens, length, drafter)
    mx.eval(state)
    draft_s, verify_s = [], []
    for _ in range(repeats + 1):  # the first one traces
        started = time.perf_counter()
        draft, state = propose(state)
        mx.eval(draft, state)
        drafted = time.perf_counter()
        state, result = commit(state, draft)
        mx.eval(state, result)
        draft_s.append(drafted - started)
        verify_s.append(time.perf_counter() - drafted)
    return median(draft_s[1:]), median(verify_s[1:])


def round_seconds(
    engine: Engine, prompt: Sequence[int], draft_tokens: int, *, capacity: int = 0
) -> float:
    """Median seconds of a round of a running text, the next one always in flight."""
    session = engine.session(prompt, draft_tokens=draft_tokens, capacity=capacity)
    times = []
    session.step()
    for _ in range(ROUNDS):
        started = time.perf_counter()
        session.step()
        times.append(time.perf_counter() - started)
    return median(times)
