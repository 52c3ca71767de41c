"""The speed-up to expect of a pair on this machine, measured before the pair is used.

One pass of a draft over a greedy text shows what rounds of every K would have kept, and so do the
proposals of text drafters along it (`replay`). Each K is counted by itself, because longer rounds
begin more often where the text is hard to guess.

All measurements of a kind take turns, and a median is quoted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import cast

import mlx.core as mx

from mlxspec.control import replay
from mlxspec.control.estimates import SIZES
from mlxspec.control.replay import Proposed
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import GREEDY
from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import RoundState
from mlxspec.defaults import MAX_AUTO_TOKENS, DraftTokens
from mlxspec.device import lengths
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.errors import UsageError
from mlxspec.measure.forecast import Contender, Forecast, MeasuredDrafter
from mlxspec.measure.timing import halves, round_seconds
from mlxspec.models.cached_model import CachedModel
from mlxspec.sampling.sampler import Sampler

ROWS = (*range(1, 17), 32)
DRAFTED = 4  # proposals in the round whose draft steps and host's share are measured
REPEATS = 7
TURNS = 3
PROMPT = 64  # tokens before the passes that are timed
TOKENS = 96  # of each text on which acceptance is counted and forecasts are checked
CANDIDATES = 4  # values of K that a tuning tries

PROMPTS = (
    "def merge(left, right):\n",
    "class Cache:\n    def __init__(self, size):\n",
    "The bicycle was invented in the nineteenth century, and",
    '{"name": "Ada", "roles": ["admin", "author"], "active": true}\n{"name": "',
)


def require_drafter(engine: Engine) -> None:
    """Raise UsageError where nothing drafts, and so nothing can be probed."""
    if not (engine.drafts or engine.texts):
        raise UsageError(
            "Nothing drafts here, so there is nothing to probe.",
            hint="Leave out --no-speculation, or name a draft with --draft.",
        )


def probe(engine: Engine, prompts: Sequence[str]) -> Forecast:
    """Measure a pair: its passes, its draft models, and its text drafters.

    Raises:
        UsageError: nothing drafts.
    """
    require_drafter(engine)
    texts = [_greedy(engine, prompt) for prompt in prompts]
    passes = _passes(engine)
    pass_s = {rows: median(times) for rows, times in passes.items()}
    engines = {name: alone(engine, name) for name in engine.drafts}
    running = _running(engine, engines)
    models = {
        name: _measured_model(one, running[name] - pass_s[DRAFTED + 1], texts)
        for name, one in engines.items()
    }
    from_text = {make().name: _from_text(make, texts) for make in engine.texts}
    return Forecast(pass_s, running[""], _spread(passes[1]), models | from_text)


def alone(engine: Engine, name: str) -> Engine:
    """An engine with one of the draft models, and no other drafter."""
    return Engine(
        engine.target,
        {name: engine.drafts[name]},
        engine.tokenizer,
        compiled=engine.compiles,
        kv=engine.kv,
    )


Text = tuple[list[int], list[int]]  # a prompt, and what follows it


def _greedy(engine: Engine, prompt: str) -> Text:
    session = engine.session(prompt, max_tokens=TOKENS, draft_tokens=0)
    length = len(session.text)
    while session.step().tokens:
        pass
    return session.text[:length], session.text[length:]


def _replayed(
    along: Sequence[Sequence[Proposed]], sizes: Mapping[int, Sequence[int]]
) -> dict[int, list[Proposed]]:
    """The rounds of every K along all texts."""
    return {
        count: [one for places in along for one in replay.rounds(places, of_round)]
        for count, of_round in sizes.items()
    }


def agreement(cached: CachedModel, text: Text) -> list[bool]:
    """For every token after the prompt, whether a draft would propose it."""
    prompt, following = text
    rows = mx.minimum(mx.array([prompt + following]), cached.vocabulary - 1)
    best = mx.argmax(cached.model(rows)[0, len(prompt) - 1 : -1], axis=-1)
    return cast(list[bool], (best == mx.array(following)).tolist())


def _running(engine: Engine, engines: Mapping[str, Engine]) -> dict[str, float]:
    """Seconds of a round of a running text, plain and with each draft, measured in turns."""
    counts = {"": (engine, 0)} | {name: (one, DRAFTED) for name, one in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in counts}
    for turn in range(TURNS + 1):
        for name, (one, count) in counts.items():
            took = round_seconds(one, _start(engine), count)
            if turn:  # the first one traces
                times[name].append(took)
    return {name: median(some) for name, some in times.items()}


def _measured_model(engine: Engine, unverified_s: float, texts: Sequence[Text]) -> MeasuredDrafter:
    """Measure the only draft of an engine.

    Args:
        unverified_s: seconds of a round with DRAFTED proposals, less the target's pass.
    """
    along = [
        replay.along_model(agreement(engine.models[1], text), MAX_AUTO_TOKENS) for text in texts
    ]
    session = engine.session(_start(engine), draft_tokens=DRAFTED)
    for _ in range(2):  # the first round proposes nothing
        session.step()
    draft_s, _ = halves(session, DRAFTED, REPEATS, next(iter(engine.drafts)))
    return MeasuredDrafter(
        draft_s / DRAFTED,
        unverified_s - draft_s,
        _replayed(along, {count: [count] for count in range(1, MAX_AUTO_TOKENS + 1)}),
    )


def _from_text(make: Callable[[], TextDrafter], texts: Sequence[Text]) -> MeasuredDrafter:
    """Measure a text drafter."""
    along = [replay.along_text(make(), *text) for text in texts]
    sizes = {most: [size for size in SIZES if size <= most] for most in SIZES}
    return MeasuredDrafter(0.0, 0.0, _replayed(along, sizes))


def _start(engine: Engine) -> list[int]:
    """An artificial prompt of PROMPT tokens."""
    return [token % engine.models[0].vocabulary for token in range(PROMPT)]


def speeds(
    engine: Engine, prompts: Sequence[str], contenders: Iterable[Contender], repeats: int = 3
) -> dict[Contender, float]:
    """Tokens per second of decoding all prompts, greedily and to token ids only.

    All contenders take turns; each figure is a median over the repeats.
    """
    engines = {name: alone(engine, name) for name in engine.drafts} | {"": engine}
    found: dict[Contender, list[float]] = {one: [] for one in contenders}
    for turn in range(repeats + 1):
        for one, measured in found.items():
            spent = [_spent(engines[one.drafter], text, one.draft_tokens) for text in prompts]
            if turn:  # the first one traces
                measured.append(sum(n for n, _ in spent) / sum(s for _, s in spent))
    return {one: median(values) for one, values in found.items()}


def _spent(engine: Engine, prompt: str, draft_tokens: DraftTokens) -> tuple[int, float]:
    """Tokens after the first round, and their seconds. The engine learns for the next text."""
    session = engine.session(prompt, max_tokens=TOKENS, draft_tokens=draft_tokens)
    session.step()
    first, started = len(session.text), time.perf_counter()
    while session.step().tokens:
        pass
    took = time.perf_counter() - started
    engine.learn_from(session)
    return len(session.text) - first, took


def stepper(
    rounds: FusedRound, state: RoundState, draft_tokens: int, length: int
) -> Callable[[], float]:
    """A callable that runs a round from the same place, waits for it, and returns its seconds.

    The proposed tokens are given, and they differ as in a text, because each may go to other
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
    """Seconds of passes by their number of rows, measured in turns."""
    sampler = Sampler(GREEDY.method(), engine.models[0].vocabulary)
    rounds = FusedRound(engine.models[0], {}, sampler, compiled=engine.compiles)
    length = lengths.attended(PROMPT + max(ROWS))

    def state() -> RoundState:
        return engine.prefilled(_start(engine), draft=False, capacity=length)

    steps = {rows: stepper(rounds, state(), rows - 1, length) for rows in ROWS}
    return in_turns(steps)


def in_turns(steps: dict[int, Callable[[], float]]) -> dict[int, list[float]]:
    """The seconds of every step, REPEATS times each, measured in turns."""
    times: dict[int, list[float]] = {key: [] for key in steps}
    for turn in range(REPEATS + 1):
        for key, step in steps.items():
            took = step()
            if turn:  # the first one traces
                times[key].append(took)
    return times


def _spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)
