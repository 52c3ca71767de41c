"""What speculation is expected to bring, from what was measured of its parts. No MLX.

A round that proposes K tokens takes C(K) = K·t_draft + T(K + 1) + t_host, where T(M) is a pass of
the target over M rows, t_draft a step of the draft, and t_host what is left of a round in a running
text: Python's share, less what overlaps. What the text proposes takes no drafting, and is waited
for. With N(K) tokens that it commits, N(K)·C(0)/C(K) is the speed-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from mlxspec.control import replay
from mlxspec.control.estimates import SIZES, TEXT, Knowledge
from mlxspec.control.records import Recommendation
from mlxspec.control.replay import Proposed
from mlxspec.defaults import AUTO, MODEL, DraftTokens

# What speculation must bring to be recommended, and medians that vary more tell nothing.
WORTH_IT = 1.02
TOO_NOISY = 0.2


class Contender(NamedTuple):
    """A way to decode: a drafter with K, nothing with 0, or what `auto` makes of all of them."""

    drafter: str
    draft_tokens: DraftTokens


PLAIN_DECODING, LEFT_TO_AUTO = Contender("", 0), Contender("", AUTO)


@dataclass(frozen=True)
class Option:
    """What a drafter's K is expected to do: tokens per round, seconds, times plain decoding."""

    drafter: str
    draft_tokens: int
    tokens: float
    seconds: float
    speed_up: float


@dataclass(frozen=True)
class MeasuredDrafter:
    """What was measured of a drafter. Times are in seconds.

    step_s: t_draft; 0 where the text proposes. host_s: t_host.
    rounds: for each K, those that it would have run.
    """

    step_s: float
    host_s: float
    rounds: Mapping[int, Sequence[Proposed]]

    @property
    def is_model(self) -> bool:
        return self.step_s > 0

    def acceptance(self, draft_tokens: int) -> tuple[float, ...]:
        """aⱼ of rounds with that K."""
        return replay.rates(self.rounds[draft_tokens], draft_tokens)


@dataclass(frozen=True)
class Forecast:
    """What was measured. Times are in seconds.

    pass_s: T(M) for M rows. plain_s: a plain round of a running text.
    noise: how far measurements of the same thing lie apart, as a fraction.
    """

    pass_s: dict[int, float]
    plain_s: float
    noise: float
    drafters: Mapping[str, MeasuredDrafter]

    @property
    def is_noisy(self) -> bool:
        return self.noise > TOO_NOISY

    def seconds(self, drafting: MeasuredDrafter, draft_tokens: int) -> float:
        """C(K)."""
        if draft_tokens == 0:
            return self.plain_s
        verifying = float(np.interp(draft_tokens + 1, [*self.pass_s], [*self.pass_s.values()]))
        return draft_tokens * drafting.step_s + verifying + drafting.host_s

    def options(self) -> list[Option]:
        """Plain decoding first, then every drafter's K."""
        plain = Option("", 0, 1.0, self.plain_s, 1.0)
        return [
            plain,
            *(
                self._option(name, drafting, count)
                for name, drafting in self.drafters.items()
                for count, replayed in drafting.rounds.items()
                if replayed
            ),
        ]

    def _option(self, name: str, drafting: MeasuredDrafter, count: int) -> Option:
        replayed = drafting.rounds[count]
        tokens = replay.tokens_per_round(replayed)
        seconds = fmean(self.seconds(drafting, one.tokens) for one in replayed)
        return Option(name, count, tokens, seconds, tokens * self.plain_s / seconds)

    def best(self) -> Option:
        """What is recommended: no speculation, where it is not expected to be worth it."""
        plain, *others = self.options()
        best = max(others, key=lambda option: option.speed_up, default=plain)
        return best if best.speed_up >= WORTH_IT else plain

    def contenders(self, count: int) -> list[Contender]:
        """Plain decoding, `auto`, and the `count` models' K of which the most is expected."""
        models = [one for one in self.options()[1:] if self.drafters[one.drafter].is_model]
        ranked = sorted(models, key=lambda option: -option.speed_up)
        best = [Contender(one.drafter, one.draft_tokens) for one in ranked[:count]]
        return [PLAIN_DECODING, *best, LEFT_TO_AUTO]

    def knowledge(self) -> dict[str, Knowledge]:
        """For a controller to start from, by the name of the drafter.

        What the text proposes costs a pass that is waited for.
        """
        waited = MeasuredDrafter(0.0, 0.0, {})
        costs = (self.seconds(waited, count) for count in range(SIZES[-1] + 1))
        known = {TEXT: Knowledge(tuple(costs), ())}
        for name, drafting in self.drafters.items():
            if drafting.is_model:
                most = max(drafting.rounds)
                costs = (self.seconds(drafting, count) for count in range(most + 1))
                rates = (max(rate, 0.01) for rate in drafting.acceptance(most))
                known[name] = Knowledge(tuple(costs), tuple(rates))
        return known

    def as_dict(self) -> dict[str, Any]:
        first = self.pass_s[1]
        return {
            "pass_s": {str(rows): seconds for rows, seconds in self.pass_s.items()},
            "pass_over_first": {str(rows): s / first for rows, s in self.pass_s.items()},
            "plain_round_s": self.plain_s,
            "drafters": {
                name: {
                    "draft_step_s": drafting.step_s,
                    "host_s": drafting.host_s,
                    "acceptance_by_position": {
                        str(count): list(drafting.acceptance(count)) for count in drafting.rounds
                    },
                }
                for name, drafting in self.drafters.items()
            },
            "noise": self.noise,
            "options": [vars(option) for option in self.options()],
            "best": vars(self.best()),
        }


def verdict_of(measured: Mapping[Contender, float]) -> Recommendation:
    """What was the fastest; no speculation, where that is hardly faster than plain decoding."""
    best = max(measured, key=measured.__getitem__)
    speed_up = measured[best] / measured[PLAIN_DECODING]
    if speed_up < WORTH_IT:
        return Recommendation(0, 1.0)
    drafter = "" if best.drafter == MODEL else best.drafter
    return Recommendation(best.draft_tokens, speed_up, drafter)
