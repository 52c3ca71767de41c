"""What a measurement has found so far, and what it comes to: one verdict. No MLX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlxspec.control.records import Recommendation
from mlxspec.defaults import BUDGET_S, MODEL
from mlxspec.measure.forecast import (
    PLAIN_DECODING,
    WORTH_MEASURING,
    Contender,
    Forecast,
    recommended,
)

INTERRUPTED = "interrupted before anything was settled"
NOT_TRIED = "expected, not tried"


@dataclass(frozen=True)
class Verdict:
    """What a measurement comes to.

    recommendation: None where the measurement settles nothing. words: one line, which for a
        recommendation is the one that `pairs show` prints of it later.
    """

    recommendation: Recommendation | None
    words: str


@dataclass
class Findings:
    """The measurements of a pair; they grow while it is measured.

    forecast: None before the first passes are timed.
    is_whole: whether everything that the forecast rests on is measured.
    tried: tokens per second of each contender; none before all of them had a turn.
    left_out: what is measured in place of all, in words. whole_s: seconds that all would take.
    is_over: whether nothing was left to measure. ended: why nothing is settled then.
    """

    budget_s: float = BUDGET_S
    forecast: Forecast | None = None
    is_whole: bool = False
    tried: dict[Contender, float] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    whole_s: float = 0.0
    is_over: bool = False
    ended: str = INTERRUPTED

    @property
    def is_settled(self) -> bool:
        """Whether nothing can pay, however good the drafts are."""
        found = self.forecast
        if found is None or len(found.pass_s) == 1 or found.is_noisy:
            return False
        return found.ceiling.speed_up < WORTH_MEASURING

    def verdict(self) -> Verdict:
        """What all this comes to; what was tried counts more than what is expected."""
        found = self.forecast
        if found is not None and found.is_noisy:
            return Verdict(
                None,
                f"this machine is too busy to tell: the same pass varies by {found.noise:.0%}; "
                "close other programs and measure again",
            )
        best = self._recommendation(found) if found is not None else None
        return Verdict(best, self.ended if best is None else str(best))

    def _recommendation(self, found: Forecast) -> Recommendation | None:
        if self.tried:
            return recommended(self.tried)
        if self.is_settled:
            rows, ratio, most = found.ceiling
            return Recommendation(
                0,
                1.0,
                note=f"a pass over {rows} rows takes {ratio:.2f} times as long as one over 1 row, "
                f"so even if every proposal were right, it would bring {most:.2f} x plain decoding",
            )
        if not self.is_whole:
            return None
        best = found.best()
        drafter = "" if best.drafter == MODEL else best.drafter
        note = NOT_TRIED if best.draft_tokens else f"plain decoding is the fastest ({NOT_TRIED})"
        return Recommendation(best.draft_tokens, best.speed_up, drafter, note)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what was not measured is not there."""
        verdict = self.verdict()
        best = verdict.recommendation
        return {
            **(self.forecast.as_dict() if self.forecast is not None else {}),
            "measured_tokens_per_second": {
                described(contender): speed for contender, speed in self.tried.items()
            },
            "budget_s": self.budget_s,
            "left_out": list(self.left_out),
            "verdict": None if best is None else asdict(best),
            "verdict_in_words": verdict.words,
        }


def described(contender: Contender) -> str:
    """A way to decode in words."""
    if contender == PLAIN_DECODING:
        return "plain"
    return f"{contender.drafter} {contender.draft_tokens}".strip()
