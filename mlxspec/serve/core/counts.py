"""What a server has done so far, in numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

from mlxspec.cascade.decision import Decision
from mlxspec.metrics import RoundStats, SpeculationStats

# Upper bounds in seconds.
FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5)
WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
LATEST, FEWEST = 33, 9  # rounds of a kind whose times are kept, and that tell their time


class Histogram:
    """Seconds, counted by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.total_s = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self.bounds, seconds)] += 1
        self.total_s += seconds

    @property
    def count(self) -> int:
        return sum(self._counts)

    def up_to(self) -> list[int]:
        """How many were at most as long as each bound, and how many there were in all."""
        return list(accumulate(self._counts))


@dataclass
class Routed:
    """Answers for which another host might have been asked, in numbers.

    spilled: that were sent there. used: whose text is the other host's. failed: that it did not
    answer. spent_tokens, cost: of its answers. saved_tokens, saved: of answers that stayed local,
    as if it had given them. Money is in the currency of its prices.
    """

    answers: int = 0
    spilled: int = 0
    used: int = 0
    failed: int = 0
    spent_tokens: int = 0
    saved_tokens: int = 0
    cost: float = 0.0
    saved: float = 0.0
    rules: Counter[str] = field(default_factory=Counter)

    def add(self, decision: Decision) -> None:
        self.answers += 1
        self.spilled += decision.spilled_over
        self.used += decision.author == "upstream"
        self.failed += decision.failed
        self.spent_tokens += decision.spent_tokens or 0
        self.saved_tokens += decision.saved_tokens
        self.cost += decision.cost or 0.0
        self.saved += decision.saved or 0.0
        self.rules.update(decision.rules)


@dataclass
class Counts:
    """What was counted since the server was started.

    calls: HTTP requests, by route and status. texts: begun. ended: texts, by their finish reason.
    rows: rounds of single texts, by B, the rows of the round, and by K, what was proposed for it.
    routed: answers that another host might have given.
    round_s: seconds of the latest rounds, by B and K.
    first_token_s, between_s: seconds from the request to the first tokens of a text, and between
        rounds that brought it tokens. whole_s: seconds of texts from the request to their ends.
    """

    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    texts: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    written_by: Counter[str] = field(default_factory=Counter)
    rows: Counter[tuple[int, int]] = field(default_factory=Counter)
    round_s: dict[tuple[int, int], deque[float]] = field(default_factory=dict)
    speculation: SpeculationStats = field(default_factory=lambda: SpeculationStats(0, auto=True))
    routed: Routed = field(default_factory=Routed)
    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_S))
    between_s: Histogram = field(default_factory=lambda: Histogram(BETWEEN_S))
    whole_s: Histogram = field(default_factory=lambda: Histogram(WHOLE_S))

    def round(self, rows: int, stats: RoundStats) -> None:
        """Count the part of one text in a round of so many rows."""
        self.rows[rows, stats.drafted] += 1
        self.speculation.add(stats)
        del self.speculation.history[:-1]  # it has an entry for every change, and no end here

    def took(self, rows: int, draft_tokens: int, seconds: float) -> None:
        """Note the time of a round."""
        kind = rows, draft_tokens
        self.round_s.setdefault(kind, deque(maxlen=LATEST)).append(seconds)

    def usual_s(self, rows: int, draft_tokens: int) -> float | None:
        """The median time of the latest rounds of a kind; None where there were too few.

        The first are slower: they are built beside other rounds.
        """
        times = self.round_s.get((rows, draft_tokens), ())
        return median(times) if len(times) >= FEWEST else None
