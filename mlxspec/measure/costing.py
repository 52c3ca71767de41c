"""Measuring what rounds cost, for models with random weights: nothing depends on their values.

In every turn all passes, all rounds and their halves are timed, and each is taken relative to the
plain round of the same turn. Where only a few layers of a target fit into memory, two targets of
different depth take part, and every time is extended along the line through both: whatever lies
outside the layers is in both of them, and every further layer takes as long as those between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import mlx.core as mx

from mlxspec.decode.engine import Engine
from mlxspec.defaults import BUDGET_S
from mlxspec.measure import plan
from mlxspec.measure.costs import Costs, RoundCost
from mlxspec.measure.forecast import pass_seconds
from mlxspec.measure.passes import Passes, spread
from mlxspec.measure.plan import DRAFTED, Pace
from mlxspec.measure.schedule import Schedule
from mlxspec.measure.timing import begun, halves, round_seconds, turns
from mlxspec.metrics import Progress, counted

MOST_DRAFTED = 8  # the largest K whose rounds are timed
FEWEST_TURNS, MOST_TURNS = 3, 15
PLAIN = ("round", 0)  # what all else in a turn is taken relative to


class Size(NamedTuple):
    """How much a turn measures: passes over these rows, rounds in a row, and each pass repeated."""

    rows: tuple[int, ...]
    rounds: int
    repeats: int

    @property
    def counts(self) -> list[int]:
        """The values of K whose rounds are timed."""
        return [rows - 1 for rows in self.rows if 1 < rows <= MOST_DRAFTED + 1]


SIZES = (
    Size((*range(1, 10), 16, 32), rounds=12, repeats=5),
    Size((*range(1, 10), 16, 32), rounds=6, repeats=3),
    Size((1, 2, 3, 5, 9, 16, 32), rounds=4, repeats=2),
    Size((1, 2, 3, 5), rounds=3, repeats=1),
)

Part = tuple[str, int]  # "pass" with rows; or "round", "halves" and "others" with K
# From an engine, a prompt, values of K and a number of rounds to the seconds of one of them.
Others = Callable[[Engine, Sequence[int], Sequence[int], int], Mapping[int, Callable[[], float]]]


@dataclass(frozen=True)
class Depths:
    """The targets that are there, by the number of their layers, and that of the whole one."""

    there: tuple[int, ...]
    whole: int

    @property
    def is_whole(self) -> bool:
        return self.there == (self.whole,)

    def extended(self, values: Mapping[int, float]) -> float:
        """The value of the whole target, on the line through those of one or two depths."""
        if len(values) == 1:
            return next(iter(values.values()))
        (few, low), (more, high) = sorted(values.items())
        return high + (self.whole - more) * (high - low) / (more - few)


class Costing(Iterator[Progress]):
    """Measures what rounds cost: an iterator of progress, with the costs so far beside it.

    `costs` is None before the first turn is over. `left_out` says what was measured in place of
    all.

    Args:
        engines: with one target each, by the number of its layers; all of them have the same draft.
        layers: of the target that is asked about.
        budget_s: seconds that measuring may take.
        others: makes callables that time a round of another program's by K; they take turns, too.
    """

    def __init__(
        self,
        engines: Mapping[int, Engine],
        layers: int,
        *,
        budget_s: float = BUDGET_S,
        others: Others | None = None,
    ) -> None:
        self.costs: Costs | None = None
        self.left_out: list[str] = []
        self.whole_s = 0.0
        self._others = others
        self._engines = dict(sorted(engines.items()))
        self._depths = Depths(tuple(self._engines), layers)
        self._schedule = Schedule(budget_s)
        self._passes = {n: Passes(one, self._schedule) for n, one in self._engines.items()}
        self._steps = self._measured()

    def __next__(self) -> Progress:
        return next(self._steps)

    @property
    def start(self) -> int:
        """How many tokens stand before the passes and rounds."""
        return len(self._start)

    @property
    def enough(self) -> int:
        """A budget in seconds that leaves the time to measure all."""
        return plan.enough(self.whole_s)

    def _measured(self) -> Iterator[Progress]:
        for passes in self._passes.values():
            yield from passes.look()
        size, count = self._planned()
        steps = self._timed(size)
        found: dict[tuple[int, str, int], list[tuple[float, ...]]] = {}
        mx.reset_peak_memory()
        yield self._schedule.begin(plan.RUNNING, len(steps) * (count + 1))
        for done in turns(steps, found, count, enough=self._schedule.late):
            yield self._schedule.after(done)
            if done % len(steps) == 0 and found:  # without the turn that is just over
                self.costs = self._costs(found)
        self.costs = self._costs(found)

    def _planned(self) -> tuple[Size, int]:
        """The largest turn of which enough fit into what is left, and how many do."""
        pace, left_s = self._passes[max(self._passes)].pace, self._schedule.left_s
        times = len(self._engines)
        expected = {size: times * _turn_s(pace, size, self._others is not None) for size in SIZES}
        first_s = self._schedule.budget_s - left_s
        self.whole_s = first_s + (FEWEST_TURNS + 1) * expected[SIZES[0]]
        fits = (one for one in SIZES if (FEWEST_TURNS + 1) * expected[one] <= left_s)
        taken = next(fits, SIZES[-1])
        count = int(left_s / expected[taken]) - 1
        count = min(max(count, 1), MOST_TURNS)
        if taken.rows != SIZES[0].rows:
            self.left_out.append(f"passes over {', '.join(map(str, taken.rows))} rows")
        if count < FEWEST_TURNS:
            self.left_out.append(counted(count, "turn"))
        self._schedule.expect({plan.RUNNING: (count + 1) * expected[taken]})
        return taken, count

    def _timed(self, size: Size) -> dict[tuple[int, str, int], Callable[[], tuple[float, ...]]]:
        """What a turn times, by depth, part and number."""
        steps: dict[tuple[int, str, int], Callable[[], tuple[float, ...]]] = {}
        start = self._start
        for depth, engine in self._engines.items():
            counts = size.counts if engine.drafts else []
            for count in (0, *counts):
                steps[depth, "round", count] = partial(_round, engine, start, count, size.rounds)
            for rows, step in self._passes[depth].steps(size.rows).items():
                steps[depth, "pass", rows] = partial(_repeated, step, size.repeats)
            for count in counts:
                steps[depth, "halves", count] = partial(_halves, engine, start, count, size.repeats)
            if self._others is not None:
                made = self._others(engine, start, (0, *counts), size.rounds)
                for count, step in made.items():
                    steps[depth, "others", count] = partial(_repeated, step, 1)
        return steps

    # --- what it comes to -------------------------------------------------------------------

    def _costs(self, found: Mapping[tuple[int, str, int], Sequence[tuple[float, ...]]]) -> Costs:
        plain = self._of_turns(found, PLAIN)
        base = median(plain)
        spreads: list[float] = []

        def seconds(part: str, number: int, at: int = 0) -> float:
            times = self._of_turns(found, (part, number), at)
            ratios = [one / each for one, each in zip(times, plain, strict=True)]
            spreads.append(spread(ratios))
            return base * median(ratios)

        def numbers(part: str) -> list[int]:
            return list(dict.fromkeys(at for _, one, at in found if one == part))

        pass_s = {rows: seconds("pass", rows) for rows in numbers("pass")}
        halves_s = {
            count: (seconds("halves", count), seconds("halves", count, 1))
            for count in numbers("halves")
        }
        rounds = {count: seconds("round", count) for count in halves_s}
        return Costs(
            pass_s,
            base,
            median(spreads),
            _added_up(rounds, halves_s, pass_s),
            {count: seconds("others", count) for count in numbers("others")},
            peak_bytes=int(mx.get_peak_memory()) if self._depths.is_whole else 0,
        )

    @property
    def _start(self) -> list[int]:
        return min((passes.start for passes in self._passes.values()), key=len)

    def _of_turns(
        self,
        found: Mapping[tuple[int, str, int], Sequence[tuple[float, ...]]],
        part: Part,
        at: int = 0,
    ) -> list[float]:
        """What a part took in every turn, of the whole target."""
        each = {depth: [one[at] for one in found[(depth, *part)]] for depth in self._engines}
        times = zip(*each.values(), strict=True)
        return [self._depths.extended(dict(zip(each, one, strict=True))) for one in times]


def _turn_s(pace: Pace, size: Size, others: bool) -> float:
    """Seconds of a turn; those of others should be about as fast."""
    begun_s = pace.reading_s(pace.start)
    counts = size.counts if pace.drafts else []
    rounds = [pace.rows_s(count + 1) + (count + 1) * pace.draft_s for count in counts]
    passes = size.repeats * sum(map(pace.rows_s, size.rows))
    running = sum(begun_s + (size.rounds + 3) * each for each in [pace.rows_s(1), *rounds])
    halved = sum(begun_s + (size.repeats + 4) * each for each in rounds)
    return passes + running * (1 + others) + halved


def _round(engine: Engine, start: Sequence[int], count: int, rounds: int) -> tuple[float]:
    return (round_seconds(engine, start, count, rounds=rounds),)


def _repeated(step: Callable[[], float], repeats: int) -> tuple[float]:
    return (median(step() for _ in range(repeats)),)


def _halves(engine: Engine, start: Sequence[int], count: int, repeats: int) -> tuple[float, float]:
    """Seconds of the draft steps and of the verification of a round."""
    session = begun(engine, start, draft_tokens=count)
    (name,) = engine.drafts
    return halves(session, count, repeats, name)


def _added_up(
    rounds: Mapping[int, float],
    halves_s: Mapping[int, tuple[float, float]],
    pass_s: Mapping[int, float],
) -> dict[int, RoundCost]:
    """The costs by K, beside what is expected of them (`forecast`).

    That is t_first + (K - 1)·t_draft + T(K + 1) + t_host. t_first is the drafting of the smallest
    K, and t_draft what the largest takes more; t_host is what one K in the middle leaves.
    """
    if not rounds:
        return {}
    most = max(rounds)
    first, _ = halves_s[1]
    step = (halves_s[most][0] - first) / max(most - 1, 1)
    without = {
        count: first + (count - 1) * step + pass_seconds(pass_s, count + 1) for count in rounds
    }
    middle = min(rounds, key=lambda count: abs(count - DRAFTED))
    host = rounds[middle] - without[middle]
    return {
        count: RoundCost(count, *halves_s[count], round_s, without[count] + host)
        for count, round_s in rounds.items()
    }
