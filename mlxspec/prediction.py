"""A drafter that follows a text which the caller expects, as in OpenAI's predicted outputs."""

from __future__ import annotations

from collections.abc import Sequence

from mlxspec.following import Follower
from mlxspec.proposals import MOST, Proposal, grade

FOLLOWED = (1, 2, 6, 16)  # tokens, from which the next grade begins


class Prediction:
    """The output is expected to be `expected`, and to begin with it.

    While the output follows, what comes next is proposed; after a difference, what comes where
    the output is found again (`Follower`). It is silent where it is lost, and at the end of
    `expected`.
    """

    def __init__(
        self, expected: Sequence[int], *, name: str = "prediction", most: int = MOST
    ) -> None:
        self.name = name
        self.most = most
        self._follower = Follower(expected)
        self._prompt_read = False

    def extend(self, tokens: Sequence[int]) -> None:
        """The prompt at first, which says nothing of the output; then the output, bit by bit."""
        if self._prompt_read:
            for token in tokens:
                self._follower.take(token)
        self._prompt_read = True

    def propose(self, limit: int) -> Proposal:
        """At most `limit` and `most` tokens. The grade tells how many were followed."""
        place = self._follower.place
        tokens = self._follower.expected[place : place + min(limit, self.most)]
        return Proposal(tokens, grade(self._follower.followed, FOLLOWED))
