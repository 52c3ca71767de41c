"""Timing rounds, their parts, and whatever else takes turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, TypeVar

import mlx.core as mx

from mlxspec.decode.engine import Engine
from mlxspec.decode.round import FusedRound
from mlxspec.decode.session import Session
from mlxspec.decode.state import RoundState
from mlxspec.defaults import AUTO, MODEL, DraftTokens
from mlxspec.metrics import Split
from mlxspec.models.prefill import finished

SLOW_ROUND_S = 0.05
ROUNDS = 30  # rounds of a running text that are timed
REPEATS = 7
MOST_BEGINNING = 64  # rounds until a draft has read a prompt, at most

Key = TypeVar("Key")
Value = TypeVar("Value")


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
    drafts = drafter in session.drafted or drafter in session.rounds.heads
    if count == 0 or round_s <= 0 or not drafts:
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


def begun(
    engine: Engine, prompt: Sequence[int], *, draft_tokens: DraftTokens, **options: Any
) -> Session:
    """A session after its first rounds, in which nothing is proposed until a draft has read.

    With `auto` a draft may read later, or never. `session.drafted` is empty then, and also where a
    draft is not worth its reading.
    """
    session = engine.session(prompt, draft_tokens=draft_tokens, **options)
    waits = draft_tokens not in (0, AUTO) and engine.drafts
    for done in range(MOST_BEGINNING):
        if done >= 2 and (session.drafted or not waits):
            break
        session.step()
    return session


def round_seconds(
    engine: Engine,
    prompt: Sequence[int],
    draft_tokens: int,
    *,
    capacity: int = 0,
    rounds: int = ROUNDS,
) -> float:
    """Median seconds of a round of a running text, the next one always in flight."""
    session = begun(engine, prompt, draft_tokens=draft_tokens, capacity=capacity)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        session.step()
        times.append(time.perf_counter() - started)
    return median(times)


def steppers(
    rounds: FusedRound, state: RoundState, counts: Iterable[int], length: int
) -> dict[int, Callable[[], float]]:
    """For each K a callable that runs a round, waits for it, and returns its seconds.

    Every round begins at the same place, on the same caches. The proposed tokens are given, and
    they differ as in a text, because each may go to other experts.
    """
    held = [state]
    place = state.position

    def step(count: int, given: mx.array | None) -> float:
        started = time.perf_counter()
        after, result = rounds(held.pop(), draft_tokens=count, length=length, given=given)
        mx.eval(after, result)
        took = time.perf_counter() - started
        held.append(after._replace(position=place))
        return took

    some = {count: mx.arange(count, dtype=mx.int32)[None] if count else None for count in counts}
    return {count: partial(step, count, given) for count, given in some.items()}


def stepper(
    rounds: FusedRound, state: RoundState, draft_tokens: int, length: int
) -> Callable[[], float]:
    """The callable of `steppers` for one K."""
    return steppers(rounds, state, [draft_tokens], length)[draft_tokens]


def turns(
    steps: Mapping[Key, Callable[[], Value]],
    found: dict[Key, list[Value]],
    repeats: int,
    *,
    warm_up: bool = True,
    enough: Callable[[], bool] = lambda: False,
) -> Generator[int, None, None]:
    """Let steps take turns, and add the results of each whole turn to `found`.

    Args:
        warm_up: whether a turn goes before whose results do not count: it traces.
        enough: asked after every turn that counts, whether to leave out the others.

    Yields:
        How many steps are over.
    """
    done = 0
    for turn in range(repeats + warm_up):
        results: dict[Key, Value] = {}
        for key, step in steps.items():
            results[key] = step()
            done += 1
            yield done
        if turn >= warm_up:
            for key, result in results.items():
                found.setdefault(key, []).append(result)
            if enough():
                return


def in_turns(
    steps: Mapping[Key, Callable[[], Value]], repeats: int = REPEATS, *, warm_up: bool = True
) -> dict[Key, list[Value]]:
    """The results of every step, `repeats` times each, measured in turns; see `turns`."""
    found: dict[Key, list[Value]] = {}
    finished(turns(steps, found, repeats, warm_up=warm_up))
    return found
