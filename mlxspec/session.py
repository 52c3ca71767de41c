"""One sequence, decoded round by round, with the host always one round behind the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from mlxspec.errors import BrokenOutput, OutOfMemory
from mlxspec.memory import watched
from mlxspec.metrics import RoundStats
from mlxspec.round import BROKEN, Round, RoundState

# Reads a text anew, with the draft or without, and returns the state before its next round.
Prefilled = Callable[[Sequence[int], bool], RoundState]


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
    """Decodes one sequence.

    Args:
        rounds: what runs.
        prefilled: reads the prompt, and the whole text again after memory ran out.
        prompt: token ids, at least one.
        limit: how many tokens there may ever be, the prompt's included.
        draft_tokens: K, proposed in every round; 0 decodes plainly. It may change between steps.
        notes: of what a person should know; the session adds to them.
    """

    def __init__(
        self,
        rounds: Round,
        prefilled: Prefilled,
        prompt: Sequence[int],
        *,
        limit: int,
        draft_tokens: int,
        notes: list[str] | None = None,
    ) -> None:
        self.draft_tokens = draft_tokens
        self.stats: RoundStats | None = None
        self.notes: list[str] = [] if notes is None else notes
        self.text = list(prompt)
        self._round = rounds
        self._prefilled = prefilled
        self._limit = limit
        self._in_flight: list[tuple[int, mx.array]] = []  # K and result, oldest first
        self._state: RoundState
        self._begin()

    @property
    def done(self) -> bool:
        """Whether the limit is reached: `step` would return no token."""
        return len(self.text) >= self._limit

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

        The next round is dispatched before this one is read. Where memory runs out, the text is
        read again and goes on with half as many proposals.

        Raises:
            OutOfMemory: plain decoding does not fit either. BrokenOutput: the target's output is
                no distribution. What was returned before stays as it is in both.
        """
        while True:
            try:
                return self._step()
            except OutOfMemory:
                if self.draft_tokens == 0:
                    raise
            self._shrink()

    def _step(self) -> list[int]:
        with watched("writing text"):
            while len(self._in_flight) < 2 and self._wants_more():
                self._dispatch()
            if not self._in_flight:
                return []
            drafted, result = self._in_flight[0]
            *tokens, accepted = cast(list[list[int]], result.tolist())[0]
        if accepted == BROKEN:
            raise BrokenOutput(len(self.text))
        del self._in_flight[0]
        committed = tokens[: accepted + 1][: self._limit - len(self.text)]
        self.text += committed
        self.stats = RoundStats(drafted, accepted, full=len(committed) == accepted + 1)
        return committed

    def _shrink(self) -> None:
        """Begin again from what is committed, proposing half as much."""
        self.draft_tokens //= 2
        how = f"{self.draft_tokens} draft tokens" if self.draft_tokens else "no draft"
        self.notes.append(f"memory ran out: going on with {how}")
        del self._state
        self._in_flight.clear()
        self._begin()

    def _begin(self) -> None:
        self._state = self._prefilled(self.text, self.draft_tokens > 0)
        if not self._state.draft:
            self.draft_tokens = 0

    def _bound(self) -> int:
        """How many tokens are committed at most once every dispatched round is."""
        return len(self.text) + sum(drafted + 1 for drafted, _ in self._in_flight)

    def _wants_more(self) -> bool:
        # Every round in flight brings at least one token.
        return len(self.text) + len(self._in_flight) < self._limit

    def _dispatch(self) -> None:
        length = attended(self._bound() + self.draft_tokens)
        if length > self._state.capacity:
            self._state = self._state.grown(reserved(length))
        self._state, result = self._round(
            self._state, draft_tokens=self.draft_tokens, length=length
        )
        mx.async_eval(result, self._state)
        self._in_flight.append((self.draft_tokens, result))
