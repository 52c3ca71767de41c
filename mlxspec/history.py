"""A drafter that proposes what followed in the text so far, prompt included."""

from __future__ import annotations

from collections.abc import Sequence

from mlxspec.proposals import MOST, Proposal, grade
from mlxspec.suffix import CAPACITY, SuffixIndex

LENGTHS = (4, 8, 16, 32)  # of a match, in tokens, from which the next grade begins


class History:
    """Text repeats itself: code that is edited, names, quotations, lists.

    Its grade is the class of how many of the last tokens occurred before; without SHORTEST such
    tokens it is silent, at next to no cost.

    Args:
        capacity: how many of the last tokens it remembers.
    """

    def __init__(
        self, *, name: str = "history", most: int = MOST, capacity: int = CAPACITY
    ) -> None:
        self.name = name
        self.most = most
        self._index = SuffixIndex(capacity=capacity)

    def extend(self, tokens: Sequence[int]) -> None:
        self._index.extend(tokens)

    def propose(self, limit: int) -> Proposal:
        """At most `limit` and `most` tokens."""
        match = self._index.continuation(min(limit, self.most))
        return Proposal(match.tokens, grade(match.length, LENGTHS))
