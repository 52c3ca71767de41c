"""The speed-up to expect of speculation, from measurements of its parts. No MLX.

A round that proposes K tokens takes C(K) = t_first + (K - 1)·t_draft + T(K + 1) + t_host. T(M) is a
pass of the target over M rows. t_first is the draft's first step, which reads the last two tokens,
and t_draft each later step, which reads one. t_host is the rest of a round in a running text:
Python's share, less what overlaps. A head that drafts all K tokens in one pass takes t_first for
any K. A proposal from the text takes no drafting, but its round is
waited for. If a round commits N(K) tokens, the speed-up is N(K)·C(0)/C(K).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from mlxspec.control import replay
from mlxspec.control.estimates import SIZES, TEXT, Knowledge
from mlxspec.control.records import Recommendation
from mlxspec.control.replay import Proposed
from mlxspec.defaults import AUTO, MODEL, DraftTokens

# The least speed-up that is recommended, and the noise above which medians tell nothing.
WORTH_IT = 1.02
TOO_NOISY = 0.2
# The least speed-up with right proposals alone that is worth measuring more. Good drafts are right
# nine times in ten, which leaves nothing of less than that.
WORTH_MEASURING = 1.1


class Contender(NamedTuple):
    """A way to decode: a drafter with K, no drafter with 0, or all drafters with `auto`."""

    drafter: str
    draft_tokens: DraftTokens


PLAIN_DECODING, LEFT_TO_AUTO = Contender("", 0), Contender("", AUTO)


@dataclass(frozen=True)
class Option:
    """The forecast for a drafter's K: tokens per round, seconds per round, and speed-up."""

    drafter: str
    draft_tokens: int
    tokens: float
    seconds: float
    speed_up: float


@dataclass(frozen=True)
class MeasuredDrafter:
    """The measurements of a drafter. Times are in seconds.

    first_s, step_s: t_first and t_draft; 0 for a text drafter. host_s: t_host.
    rounds: for each K, the rounds that it would have run, at least one.
    at_once: whether one pass drafts all tokens: then t_first is that pass, and t_draft 0.
    """

    first_s: float
    step_s: float
    host_s: float
    rounds: Mapping[int, Sequence[Proposed]]
    at_once: bool = False

    @property
    def is_model(self) -> bool:
        return self.first_s > 0

    def drafting_s(self, draft_tokens: int) -> float:
        """Seconds in which it proposes `draft_tokens` tokens, at least 1."""
        return self.first_s + (draft_tokens - 1) * self.step_s

    def acceptance(self, draft_tokens: int) -> tuple[float, ...]:
        """aⱼ of rounds with K = `draft_tokens`."""
        return replay.rates(self.rounds[draft_tokens], draft_tokens)


class Ceiling(NamedTuple):
    """The most that speculation can bring: the drafts take no time, and are always right.

    rows: M of the pass that brings it. ratio: T(M)/T(1). speed_up: M·T(1)/T(M).
    """

    rows: int
    ratio: float
    speed_up: float


@dataclass(frozen=True)
class Forecast:
    """The measurements of a pair, and what they predict. Times are in seconds.

    pass_s: T(M) for M rows. plain_s: a plain round of a running text.
    noise: the spread of repeated measurements, as a fraction of their median.
    drafters: those that were measured so far.
    """

    pass_s: dict[int, float]
    plain_s: float
    noise: float
    drafters: Mapping[str, MeasuredDrafter] = field(default_factory=dict)

    @property
    def ceiling(self) -> Ceiling:
        """The best of the measured passes over several rows. Raises ValueError without any."""
        first = self.pass_s[1]
        several = [rows for rows in self.pass_s if rows > 1]
        rows = max(several, key=lambda count: count / self.pass_s[count])
        ratio = self.pass_s[rows] / first
        return Ceiling(rows, ratio, rows / ratio)

    @property
    def is_noisy(self) -> bool:
        return self.noise > TOO_NOISY

    def seconds(self, drafting: MeasuredDrafter, draft_tokens: int) -> float:
        """C(K) in seconds; never less than a plain round, whatever a busy machine made of it."""
        if draft_tokens == 0:
            return self.plain_s
        verifying = pass_seconds(self.pass_s, draft_tokens + 1)
        expected = drafting.drafting_s(draft_tokens) + verifying + drafting.host_s
        return max(expected, self.plain_s)

    def options(self) -> list[Option]:
        """Plain decoding first, then every drafter's K."""
        plain = Option("", 0, 1.0, self.plain_s, 1.0)
        return [
            plain,
            *(
                self._option(name, drafting, count)
                for name, drafting in self.drafters.items()
                for count in drafting.rounds
            ),
        ]

    def _option(self, name: str, drafting: MeasuredDrafter, count: int) -> Option:
        replayed = drafting.rounds[count]
        tokens = replay.tokens_per_round(replayed)
        seconds = fmean(self.seconds(drafting, one.tokens) for one in replayed)
        return Option(name, count, tokens, seconds, tokens * self.plain_s / seconds)

    def best(self) -> Option:
        """The recommended option: no speculation, where it is not expected to pay."""
        plain, *others = self.options()
        best = max(others, key=lambda option: option.speed_up, default=plain)
        return best if best.speed_up >= WORTH_IT else plain

    def contenders(self, count: int) -> list[Contender]:
        """Plain decoding, `auto`, and the `count` values of K of models that promise most."""
        models = [one for one in self.options()[1:] if self.drafters[one.drafter].is_model]
        ranked = sorted(models, key=lambda option: -option.speed_up)
        best = [Contender(one.drafter, one.draft_tokens) for one in ranked[:count]]
        return [PLAIN_DECODING, *best, LEFT_TO_AUTO]

    def knowledge(self) -> dict[str, Knowledge]:
        """Knowledge for a controller to start from, by the name of the drafter.

        A proposal from the text costs a pass that is waited for. Longer passes than the longest
        that was measured are not known.
        """
        waited = MeasuredDrafter(0.0, 0.0, 0.0, {})
        reach = min(SIZES[-1] + 1, max(self.pass_s))
        costs = (self.seconds(waited, count) for count in range(reach))
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
                    "draft_first_step_s": drafting.first_s,
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
        }


def pass_seconds(pass_s: Mapping[int, float], rows: int) -> float:
    """T(M) for M = `rows`: linear between measured passes, and beyond the last of them.

    Args:
        pass_s: seconds by rows, in increasing order; 1 is among them.
    """
    if len(pass_s) == 1:  # the worst that can be expected of a pass
        return rows * pass_s[1]
    counts = [*pass_s]
    after = next((at for at, count in enumerate(counts) if count >= rows), len(counts) - 1)
    low, high = counts[max(after, 1) - 1], counts[max(after, 1)]
    step = (pass_s[high] - pass_s[low]) / (high - low)
    if rows > high:
        step = max(step, 0.0)  # more rows never take less
        return pass_s[high] + step * (rows - high)
    return pass_s[low] + step * (rows - low)


def recommended(measured: Mapping[Contender, float]) -> Recommendation:
    """The fastest contender; no speculation where it is hardly faster than plain decoding."""
    best = max(measured, key=measured.__getitem__)
    speed_up = measured[best] / measured[PLAIN_DECODING]
    if speed_up < WORTH_IT:
        return Recommendation(0, 1.0)
    drafter = "" if best.drafter == MODEL else best.drafter
    return Recommendation(best.draft_tokens, speed_up, drafter)
