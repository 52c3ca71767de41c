"""One sequence, decoded round by round, with the host always one round behind the device."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlxspec.metrics import RoundStats
from mlxspec.round import Round, RoundState


def attended(length: int) -> int:
    """Entries to attend over for `length` that are needed.

    A new number is a new graph to trace and a larger one is work on entries that nobody sees, so
    it grows by an eighth, in multiples of 64.
    """
    step = max(64, length // 8 // 64 * 64)
    return -(-length // step) * step


def reserved(length: int) -> int:
    """Entries to store for `length` that are needed: by a quarter, in multiples of 256."""
    step = max(256, length // 4 // 256 * 256)
    return -(-length // step) * step


class Session:
    """Decodes one sequence from a prefilled state.

    Args:
        rounds: what runs.
        state: of one sequence, prefilled.
        tokens: how many tokens are committed, the prompt's.
        limit: how many may ever be.
        draft_tokens: K, proposed in every round; 0 decodes plainly. It may change between steps.
    """

    def __init__(
        self, rounds: Round, state: RoundState, *, tokens: int, limit: int, draft_tokens: int
    ) -> None:
        self.draft_tokens = draft_tokens
        self.stats: RoundStats | None = None
        self._round = rounds
        self._state = state
        self._tokens = tokens
        self._limit = limit
        self._in_flight: list[tuple[int, mx.array]] = []  # K and result, oldest first

    @property
    def done(self) -> bool:
        """Whether the limit is reached: `step` would return no token."""
        return self._tokens >= self._limit

    @property
    def rounds(self) -> Round:
        return self._round

    def ahead(self, rounds: int) -> tuple[RoundState, int]:
        """The device's latest state with room for so many more rounds, and their length.

        For measurements: what is computed from it leaves the session as it was.
        """
        length = attended(self._bound() + rounds * (self.draft_tokens + 1))
        return self._state.grown(max(reserved(length), self._state.capacity)), length

    def step(self) -> list[int]:
        """Commit one round and return its tokens: 1 … K + 1 of them, or none when done.

        The next round is dispatched before this one is read.
        """
        while len(self._in_flight) < 2 and self._wants_more():
            self._dispatch()
        if not self._in_flight:
            return []
        drafted, result = self._in_flight.pop(0)
        *tokens, accepted = cast(list[list[int]], result.tolist())[0]
        committed = tokens[: accepted + 1][: self._limit - self._tokens]
        self._tokens += len(committed)
        self.stats = RoundStats(drafted, accepted, full=len(committed) == accepted + 1)
        return committed

    def _bound(self) -> int:
        """How many tokens are committed at most once every dispatched round is."""
        return self._tokens + sum(drafted + 1 for drafted, _ in self._in_flight)

    def _wants_more(self) -> bool:
        # Every round in flight brings at least one token.
        return self._tokens + len(self._in_flight) < self._limit

    def _dispatch(self) -> None:
        length = attended(self._bound() + self.draft_tokens)
        if length > self._state.capacity:
            self._state = self._state.grown(reserved(length))
        self._state, result = self._round(
            self._state, draft_tokens=self.draft_tokens, length=length
        )
        mx.async_eval(result, self._state)
        self._in_flight.append((self.draft_tokens, result))
