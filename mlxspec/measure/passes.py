"""The time of one pass of the target over some rows, T(M), and a first look at every model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import inf
from statistics import median

import mlx.core as mx

from mlxspec.decode.alone import alone
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import GREEDY
from mlxspec.decode.round import FusedRound
from mlxspec.device import lengths
from mlxspec.measure.forecast import Forecast, pass_seconds
from mlxspec.measure.plan import FIRST_PASSES, LOOK, Pace
from mlxspec.measure.schedule import Schedule
from mlxspec.measure.timing import steppers, turns
from mlxspec.metrics import Progress
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.original import fresh_cache
from mlxspec.sampling.sampler import Sampler

# Tokens before the passes: as many as are read in this share of the budget.
STARTS, START_SHARE = (64, 16, 4, 2), 0.05
# Rows of the first passes, and of those that are added where they take this share of the budget.
FEW, MORE, FEW_SHARE = (1, 2), (8, 32), 0.1
FEW_REPEATS = 7
SLOW_PASS_S = 1.0  # that is not repeated for a first look
MOST_ROWS = 32


class Passes:
    """Times the passes of an engine's target.

    `times` are seconds by rows, and `start` is an artificial prompt, a short one where a pass is
    slow.
    """

    def __init__(self, engine: Engine, schedule: Schedule) -> None:
        self.times: dict[int, list[float]] = {}
        self.start: list[int] = []
        self._engine = engine
        self._schedule = schedule
        self._bare_s: list[float] = []
        self._building_s = 0.0
        self._steps: dict[int, Callable[[], float]] = {}

    @property
    def pass_s(self) -> dict[int, float]:
        """T(M) by rows, as far as it is known."""
        return {rows: median(times) for rows, times in sorted(self.times.items())}

    @property
    def pace(self) -> Pace:
        """The times that a plan is made from."""
        drafts, heads = self._bare_s[1:], len(self._engine.heads)
        start = len(self.start)
        return Pace(self.pass_s, sum(drafts), len(drafts), self._building_s, start, heads)

    def forecast(self) -> Forecast:
        """What is known so far: no drafter yet."""
        return Forecast(self.pass_s, self.pass_s[1], spread(self.times[1]))

    def look(self) -> Iterator[Progress]:
        """Time a pass of each model over one row and of each head, then a few of the target."""
        budget_s = self._schedule.budget_s
        looks = [partial(_one_row, cached) for cached in self._engine.models]
        looks += [partial(_one_proposal, self._engine, name) for name in self._engine.heads]
        yield self._schedule.begin(LOOK, len(looks))
        for look in looks:
            self._bare_s.append(look())
            yield self._schedule.after(len(self._bare_s))
        fits = (n for n in STARTS if n * self._bare_s[0] <= START_SHARE * budget_s)
        self.start = _prompt(self._engine, next(fits, STARTS[-1]))
        yield self._schedule.begin(FIRST_PASSES, len(FEW) + len(MORE))
        self._prepare()
        first = {}
        for rows in FEW:
            first[rows] = self._steps[rows]()
            yield self._schedule.after(len(first))
        self._time_few(first)
        for done, rows in enumerate(MORE, len(FEW) + 1):
            if 2 * pass_seconds(self.pass_s, rows) > FEW_SHARE * budget_s:
                break
            self._steps[rows]()
            self.times[rows] = [self._steps[rows]()]
            yield self._schedule.after(done)

    def steps(self, rows: Iterable[int]) -> dict[int, Callable[[], float]]:
        """Callables that time a pass each, by rows."""
        return {count: self._steps[count] for count in rows}

    def _prepare(self) -> None:
        sampler = Sampler(GREEDY.method(), self._engine.models[0].vocabulary)
        rounds = FusedRound(self._engine.models[0], {}, sampler, compiled=self._engine.compiles)
        length = lengths.attended(len(self.start) + MOST_ROWS)
        # Without heads, which would follow the passes.
        state = alone(self._engine, "").prefilled(self.start, draft=False, capacity=length)
        steps = steppers(rounds, state, range(MOST_ROWS), length)
        self._steps = {count + 1: step for count, step in steps.items()}

    def _time_few(self, first: dict[int, float]) -> None:
        """Time the first passes again, unless that takes long: they were traced then, too."""
        once_s, budget_s = sum(first.values()), FEW_SHARE * self._schedule.budget_s
        repeats = min(int(budget_s / once_s), FEW_REPEATS)
        for _ in turns(self.steps(FEW), self.times, repeats, warm_up=False):
            pass
        if not repeats:
            self.times |= {rows: [seconds] for rows, seconds in first.items()}
        self._building_s = max(first[rows] - self.pass_s[rows] for rows in FEW)


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)


def _one_row(cached: CachedModel) -> float:
    """Seconds of a pass over one row on mlx-lm's own caches."""
    caches = fresh_cache(cached.model, None)
    return _better_of_two(lambda: mx.eval(cached.model(mx.array([[0]]), cache=caches)))


def _one_proposal(engine: Engine, name: str) -> float:
    """Seconds in which a head proposes one token."""
    one = alone(engine, name, compiled=False)
    rounds = one.rounds.with_sampler(Sampler(GREEDY.method(), engine.models[0].vocabulary))
    state = one.prefilled([0, 0])
    propose, _ = rounds.halves(1, lengths.attended(3), name)
    mx.eval(state)
    return _better_of_two(lambda: mx.eval(propose(state)[0]))


def _better_of_two(step: Callable[[], None]) -> float:
    """Seconds that it takes: of the first time, if that is slow."""
    best = inf
    for _ in range(2):
        started = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - started)
        if best > SLOW_PASS_S:
            break
    return best


def _prompt(engine: Engine, length: int) -> list[int]:
    """An artificial prompt."""
    return [token % engine.models[0].vocabulary for token in range(length)]
