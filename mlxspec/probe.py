"""What speculation would bring with a pair on this machine, measured before it is used.

A round that proposes K tokens commits N(K) = 1 + Σₖ Πⱼ≤ₖ aⱼ of them and takes
C(K) = K·t_draft + T(K + 1) + t_host, where aⱼ is how often position j is accepted once it is
reached, T(M) a pass of the target over M rows, t_draft a step of the draft, and t_host what is left
of a round in a running text: Python's share, less what overlaps. N(K)·C(0)/C(K) is the speed-up.

As long as proposals are right they follow the text, whatever K is. So one pass of the draft over a
greedy text tells what rounds of every K would have kept; and each K is counted for itself, because
longer rounds begin oftener where the text is hard to guess.

All measurements of a kind take turns, and a median is quoted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxspec import lengths
from mlxspec.engine import GREEDY, Engine
from mlxspec.errors import UsageError
from mlxspec.estimates import SIZES, TEXT, Knowledge, acceptance_rates, expected_tokens
from mlxspec.pairs import MAX_AUTO_TOKENS
from mlxspec.round import Round, RoundState
from mlxspec.sampling import Sampler
from mlxspec.timing import halves, round_seconds
from mlxspec.tuning import Verdict

ROWS = (*range(1, 17), 32)
DRAFTED = 4  # proposals in the round whose draft steps and host's share are measured
REPEATS = 7
PROMPT = 64  # tokens before the passes that are timed
TOKENS = 96  # of each text on which acceptance is counted, and what was predicted is tried
# What speculation must bring to be recommended, and medians that vary more tell nothing.
WORTH_IT = 1.02
CANDIDATES = 4  # numbers of draft tokens that a tuning tries
TOO_NOISY = 0.2

PROMPTS = (
    "def merge(left, right):\n",
    "class Cache:\n    def __init__(self, size):\n",
    "The bicycle was invented in the nineteenth century, and",
    '{"name": "Ada", "roles": ["admin", "author"], "active": true}\n{"name": "',
)


@dataclass(frozen=True)
class Option:
    """What K draft tokens are expected to do: tokens per round, seconds, times plain decoding."""

    draft_tokens: int
    tokens: float
    seconds: float
    speed_up: float


@dataclass(frozen=True)
class Probe:
    """What was measured. Times are in seconds.

    pass_s: T(M) for M rows. draft_s: a step of the draft. host_s: t_host.
    plain_s: a plain round of a running text.
    acceptance: for each K from 1 on, aⱼ of its rounds for the positions from the first on.
    noise: how far measurements of the same thing lie apart, as a fraction.
    """

    pass_s: dict[int, float]
    draft_s: float
    host_s: float
    plain_s: float
    acceptance: tuple[tuple[float, ...], ...]
    noise: float

    @property
    def is_noisy(self) -> bool:
        return self.noise > TOO_NOISY

    def seconds(self, draft_tokens: int) -> float:
        """C(K)."""
        if draft_tokens == 0:
            return self.plain_s
        return draft_tokens * self.draft_s + self.pass_s[draft_tokens + 1] + self.host_s

    def options(self) -> list[Option]:
        """What is expected for K = 0, 1, 2, …"""
        tokens = [1.0, *(expected_tokens(rates)[-1] for rates in self.acceptance)]
        return [
            Option(k, n, self.seconds(k), n * self.plain_s / self.seconds(k))
            for k, n in enumerate(tokens)
        ]

    def best(self) -> Option:
        """What is recommended: no speculation, where it is not expected to be worth it."""
        plain, *others = self.options()
        best = max(others, key=lambda option: option.speed_up)
        return best if best.speed_up >= WORTH_IT else plain

    def candidates(self) -> list[int]:
        """The K that are worth a try on real texts."""
        ranked = sorted(self.options(), key=lambda option: -option.speed_up)
        return [option.draft_tokens for option in ranked[:CANDIDATES]]

    def knowledge(self) -> Knowledge:
        """For a controller to start from."""
        costs = tuple(self.seconds(k) for k in range(len(self.acceptance) + 1))
        return Knowledge(costs, tuple(max(rate, 0.01) for rate in self.acceptance[-1]))

    def as_dict(self) -> dict[str, Any]:
        first = self.pass_s[1]
        return {
            "pass_s": {str(rows): seconds for rows, seconds in self.pass_s.items()},
            "pass_over_first": {str(rows): s / first for rows, s in self.pass_s.items()},
            "draft_step_s": self.draft_s,
            "host_s": self.host_s,
            "plain_round_s": self.plain_s,
            "acceptance_by_position": {
                str(k): list(rates) for k, rates in enumerate(self.acceptance, 1)
            },
            "noise": self.noise,
            "options": [vars(option) for option in self.options()],
            "best": vars(self.best()),
        }


def require_draft(engine: Engine) -> None:
    """Raise UsageError where nothing drafts, and so nothing can be probed."""
    if engine.draft is None:
        raise UsageError(
            "This pair has no draft, so there is nothing to probe.",
            hint="Choose one that has, or name a draft with --draft.",
        )


def probe(engine: Engine, prompts: Sequence[str]) -> Probe:
    """Measure everything on a pair.

    Raises:
        UsageError: nothing drafts.
    """
    require_draft(engine)
    acceptance = _acceptance(engine, prompts)
    passes = _passes(engine)
    draft_s, host_s, plain_s = _round_parts(engine, passes)
    return Probe(
        {rows: median(times) for rows, times in passes.items()},
        draft_s,
        host_s,
        plain_s,
        acceptance,
        _spread(passes[1]),
    )


def speeds(
    engine: Engine, prompts: Sequence[str], counts: Iterable[int], repeats: int = 3
) -> dict[int, float]:
    """Tokens per second of decoding all prompts with each K, greedily and without text.

    Everything takes turns; a median over the repeats.
    """
    found: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(repeats + 1):
        spent = {count: [_spent(engine, prompt, count) for prompt in prompts] for count in found}
        for count, some in spent.items():
            if turn:  # the first one traces
                found[count].append(sum(n for n, _ in some) / sum(s for _, s in some))
    return {count: median(values) for count, values in found.items()}


def _spent(engine: Engine, prompt: str, count: int) -> tuple[int, float]:
    """Tokens after the first round, and their seconds."""
    session = engine.session(prompt, max_tokens=TOKENS, draft_tokens=count)
    session.step()
    first, started = len(session.text), time.perf_counter()
    while session.step():
        pass
    return len(session.text) - first, time.perf_counter() - started


def _acceptance(engine: Engine, prompts: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    along = [agreement(engine, prompt) for prompt in prompts]
    return tuple(rates_along(along, count) for count in range(1, MAX_AUTO_TOKENS + 1))


def agreement(engine: Engine, prompt: str) -> list[bool]:
    """Of every token of the greedy text after a prompt, whether the draft would propose it."""
    session = engine.session(prompt, max_tokens=TOKENS, draft_tokens=0)
    length = len(session.text)
    while session.step():
        pass
    draft = engine.networks[1]
    rows = mx.minimum(mx.array([session.text]), draft.vocabulary - 1)
    best = mx.argmax(draft.model(rows)[0, length - 1 : -1], axis=-1)
    return cast(list[bool], (best == mx.array(session.text[length:])).tolist())


def rates_along(along: Sequence[Sequence[bool]], count: int) -> tuple[float, ...]:
    """aⱼ of rounds of `count` proposals, where texts agree with their draft so."""
    kept = [accepted for agrees in along for accepted in kept_along(agrees, count)]
    hits = [sum(accepted > j for accepted in kept) for j in range(count)]
    return tuple(acceptance_rates(hits, [len(kept), *hits[:-1]]))


def kept_along(agrees: Sequence[bool], count: int) -> list[int]:
    """How many proposals each round of `count` keeps, as far as whole rounds go."""
    kept, at = [], 0
    while at + count < len(agrees):
        accepted = next((k for k in range(count) if not agrees[at + k]), count)
        kept.append(accepted)
        at += accepted + 1
    return kept


def stepper(
    rounds: Round, state: RoundState, draft_tokens: int, length: int
) -> Callable[[], float]:
    """Runs a round from the same place each time, waits for it, and returns its seconds.

    What is proposed is given, and differs from token to token as a text does: each may go to other
    experts.
    """
    held = [state]
    place = state.position
    given = mx.arange(draft_tokens, dtype=mx.int32)[None] if draft_tokens else None

    def step() -> float:
        started = time.perf_counter()
        after, result = rounds(held.pop(), draft_tokens=draft_tokens, length=length, given=given)
        mx.eval(after, result)
        took = time.perf_counter() - started
        held.append(after._replace(position=place))
        return took

    return step


def _passes(engine: Engine) -> dict[int, list[float]]:
    """Seconds of passes of so many rows, measured in turns."""
    sampler = Sampler(GREEDY.method(), engine.networks[0].vocabulary)
    rounds = Round(engine.networks[0], {}, sampler, compiled=engine.compiles)
    prompt = [token % engine.networks[0].vocabulary for token in range(PROMPT)]
    length = lengths.attended(PROMPT + max(ROWS))

    def state() -> RoundState:
        return engine.prefilled(prompt, draft=False, capacity=length)

    steps = {rows: stepper(rounds, state(), rows - 1, length) for rows in ROWS}
    return in_turns(steps)


def in_turns(steps: dict[int, Callable[[], float]]) -> dict[int, list[float]]:
    """What every step took, REPEATS times, one after the other."""
    times: dict[int, list[float]] = {key: [] for key in steps}
    for turn in range(REPEATS + 1):
        for key, step in steps.items():
            took = step()
            if turn:  # the first one traces
                times[key].append(took)
    return times


def _round_parts(engine: Engine, passes: dict[int, list[float]]) -> tuple[float, float, float]:
    """t_draft, t_host, and a plain round, from rounds of running texts."""
    prompt = [token % engine.networks[0].vocabulary for token in range(PROMPT)]
    session = engine.session(prompt, draft_tokens=DRAFTED)
    for _ in range(2):  # the first round proposes nothing
        session.step()
    draft_s, _ = halves(session, DRAFTED, REPEATS, next(iter(engine.drafts)))
    running: dict[int, list[float]] = {0: [], DRAFTED: []}
    for turn in range(4):
        for count, times in running.items():
            took = round_seconds(engine, prompt, count)
            if turn:
                times.append(took)
    whole_s, plain_s = median(running[DRAFTED]), median(running[0])
    host_s = whole_s - draft_s - median(passes[DRAFTED + 1])
    return draft_s / DRAFTED, host_s, plain_s


def _spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)


def verdict_of(measured: Mapping[int, float]) -> Verdict:
    """The K that was the fastest; none, where that is hardly faster than plain decoding."""
    best = max(measured, key=measured.__getitem__)
    speed_up = measured[best] / measured[0]
    return Verdict(best, speed_up) if speed_up >= WORTH_IT else Verdict(0, 1.0)


def knowledge_of(probe: Probe, engine: Engine) -> dict[str, Knowledge]:
    """By the name of the drafter, the first of several.

    What the text proposes costs a pass that is waited for.
    """
    rows = sorted(probe.pass_s)
    passes = [
        float(np.interp(k + 1, rows, [probe.pass_s[r] for r in rows]))
        for k in range(1, SIZES[-1] + 1)
    ]
    return {
        next(iter(engine.drafts)): probe.knowledge(),
        TEXT: Knowledge((probe.plain_s, *passes), ()),
    }
