"""What rounds cost, and from which acceptance rate on they pay. No MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxspec.measure.break_even import best, pays_above
from mlxspec.measure.forecast import TOO_NOISY

RATES = (0.5, 0.6, 0.7, 0.8, 0.9)  # acceptance rates that a person has in mind


@dataclass(frozen=True)
class RoundCost:
    """A round of K draft tokens, in seconds.

    draft_s, verify_s: its halves, each waited for. round_s: of a round in a running text, where
    the host is one ahead. expected_s: what the parts of a round come to, mostly of other K.
    """

    draft_tokens: int
    draft_s: float
    verify_s: float
    round_s: float
    expected_s: float

    @property
    def host_s(self) -> float:
        """What is left of a round without its halves; negative where they overlap."""
        return self.round_s - self.draft_s - self.verify_s


@dataclass(frozen=True)
class Costs:
    """The times of a target, and of a draft for it. Times are in seconds.

    pass_s: T(M) by rows, each waited for. plain_s: C(0), a plain round of a running text.
    noise: the usual spread of what was measured repeatedly, each time relative to a plain round, as
    a fraction of the median. rounds: by K; none without a draft. others: seconds of another
    program's rounds by K, 0 for a plain one. peak_bytes: the most memory while rounds ran; 0 where
    only a few layers were there.
    """

    pass_s: Mapping[int, float]
    plain_s: float
    noise: float
    rounds: Mapping[int, RoundCost] = field(default_factory=dict)
    others: Mapping[int, float] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def is_noisy(self) -> bool:
        return self.noise > TOO_NOISY

    def over_plain(self) -> dict[int, float]:
        """C(K)/C(0) by K; without a draft, of proposals from the text."""
        if not self.rounds:
            return self.text_over_plain()
        return {count: one.round_s / self.plain_s for count, one in self.rounds.items()}

    def text_over_plain(self) -> dict[int, float]:
        """The same of proposals from the text, which take no drafting: T(K + 1)/C(0)."""
        return {rows - 1: one / self.plain_s for rows, one in self.pass_s.items() if rows > 1}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        first, over = self.pass_s[1], self.over_plain()
        return {
            "pass_s": {str(rows): seconds for rows, seconds in self.pass_s.items()},
            "pass_over_first": {str(rows): s / first for rows, s in self.pass_s.items()},
            "plain_round_s": self.plain_s,
            "noise": self.noise,
            "peak_bytes": self.peak_bytes,
            "rounds": [
                {
                    **vars(one),
                    "host_s": one.host_s,
                    "over_plain": over[count],
                    "pays_above": pays_above(over[count], count),
                }
                for count, one in self.rounds.items()
            ],
            "from_text": [
                {"draft_tokens": count, "over_plain": cost, "pays_above": pays_above(cost, count)}
                for count, cost in self.text_over_plain().items()
            ],
            "best": [
                {"acceptance_rate": rate, "draft_tokens": count, "speed_up": speed_up}
                for rate in RATES
                for count, speed_up in [best(over, rate)]
            ],
        }
