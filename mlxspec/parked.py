"""Why nothing is proposed, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parked:
    """Speculation is parked, because it was expected to lose `loss` of the speed, a fraction.

    It is tried again in `retry_in` rounds. `texts` were written at a time; rounds of `draft_tokens`
    proposals would have been the best, at `cost` plain rounds each, and `brings` tokens of a text.
    """

    loss: float
    retry_in: int
    texts: int = 1
    draft_tokens: int = 0
    cost: float = 1.0
    brings: float = 1.0

    @property
    def why(self) -> str:
        """The reason, in words."""
        if not self.draft_tokens:
            return f"speculation was losing {self.loss:.0%}"
        plural = "" if self.draft_tokens == 1 else "s"
        return (
            f"{self.texts} texts at a time: proposing costs more than it brings (a round of "
            f"{self.draft_tokens} proposal{plural} takes {self.cost:.1f} x a plain one and brings "
            f"{self.brings:.1f} x)"
        )
