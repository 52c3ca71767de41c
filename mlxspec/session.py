"""One sequence, decoded round by round, with the host always one round behind the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import mlx.core as mx

from mlxspec.control import PLAIN, Choice, Controller
from mlxspec.drafters import MODEL
from mlxspec.errors import BrokenOutput, OutOfMemory
from mlxspec.memory import watched
from mlxspec.metrics import Parked, RoundStats
from mlxspec.round import BROKEN, Round, RoundState
from mlxspec.stopwatch import Marks, Stopwatch

# Reads a text anew, with the draft or without, and returns the state before its next round.
Prefilled = Callable[[Sequence[int], bool], RoundState]


def attended(length: int) -> int:
    """Entries to attend over for `length` that are needed.

    A new number is a new graph to trace, for every K in use, and a larger one is work on entries
    that nobody sees: so it grows by an eighth, in multiples of 128.
    """
    if length <= 64:
        return 64
    step = max(128, length // 8 // 128 * 128)
    return -(-length // step) * step


def reserved(length: int) -> int:
    """Entries to store for `length` that are needed: by a quarter, in multiples of 256."""
    step = max(256, length // 4 // 256 * 256)
    return -(-length // step) * step


class InFlight(NamedTuple):
    """A round that was dispatched and not read.

    fair: nothing was built on the way that later rounds need not build.
    dispatched_s, dispatching_s: see `Marks`.
    """

    choice: Choice
    result: mx.array
    fair: bool
    parked: Parked | None
    dispatched_s: float
    dispatching_s: float


class Session:
    """Decodes one sequence.

    Args:
        rounds: what runs.
        prefilled: reads the prompt, and the whole text again after memory ran out.
        prompt: token ids, at least one.
        limit: how many tokens there may ever be, the prompt's included.
        draft_tokens: K, the most that is proposed in a round; 0 decodes plainly.
        controller: chooses how many; None is always the most.
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
        controller: Controller | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self.draft_tokens = draft_tokens
        self.controller = controller
        self.stats: RoundStats | None = None
        self.notes: list[str] = [] if notes is None else notes
        self.text = list(prompt)
        self._round = rounds
        self._prefilled = prefilled
        self._limit = limit
        self._in_flight: list[InFlight] = []  # oldest first
        self._chosen: Choice | None = None  # for the next round, where it has to wait
        self._stopwatch = Stopwatch()
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
            depth = 1 if self._round.waits else 2
            while len(self._in_flight) < depth and self._wants_more() and self._dispatch():
                pass
            if not self._in_flight:
                return []
            one = self._in_flight[0]
            asked_s = time.perf_counter()
            *tokens, accepted = cast(list[list[int]], one.result.tolist())[0]
            read_s = time.perf_counter()
        if accepted == BROKEN:
            raise BrokenOutput(len(self.text))
        del self._in_flight[0]
        committed = tokens[: accepted + 1][: self._limit - len(self.text)]
        self.text += committed
        self.stats = RoundStats(
            one.choice.draft_tokens,
            accepted,
            full=len(committed) == accepted + 1,
            drafter=one.choice.drafter,
            parked=one.parked,
        )
        if one.choice.draft_tokens:
            self._drafted_to = max(len(self.text) - 2, 0)
        marks = Marks(one.dispatched_s, one.dispatching_s, read_s, read_s - asked_s)
        took = self._stopwatch.took(marks, fair=one.fair)
        if self.controller is not None:
            self.controller.kept(one.choice, accepted)
            if took is not None:
                self.controller.took(one.choice, took)
        return committed

    def _shrink(self) -> None:
        """Begin again from what is committed, proposing half as much."""
        self.draft_tokens //= 2
        how = f"{self.draft_tokens} draft tokens" if self.draft_tokens else "no draft"
        self.notes.append(f"memory ran out: going on with {how}")
        del self._state
        self._in_flight.clear()
        self._chosen = None
        self._begin()

    def _begin(self) -> None:
        self._state = self._prefilled(self.text, self.draft_tokens > 0)
        self._drafted_to = max(len(self.text) - 2, 0)  # where the draft's past ends
        self._stopwatch.stop()
        if not self._state.draft:
            self.draft_tokens = 0

    def _bound(self) -> int:
        """How many tokens are committed at most once every dispatched round is."""
        return len(self.text) + sum(one.choice.draft_tokens + 1 for one in self._in_flight)

    def _wants_more(self) -> bool:
        # Every round in flight brings at least one token.
        return len(self.text) + len(self._in_flight) < self._limit

    def _choice(self) -> Choice:
        # A draft is fed the last two tokens, so there have to be two.
        if self.draft_tokens == 0 or len(self.text) + len(self._in_flight) < 2:
            return PLAIN
        if self.controller is None:
            return Choice(MODEL, self.draft_tokens)
        choice = self.controller.choose(len(self.text))
        return replace(choice, draft_tokens=min(choice.draft_tokens, self.draft_tokens))

    def _dispatch(self) -> bool:
        """Dispatch the next round; False if what is in flight must be read first."""
        choice = self._chosen or self._choice()
        count = choice.draft_tokens
        length = attended(self._bound() + count)
        if length > self._state.capacity:
            self._state = self._state.grown(reserved(length))
        if count and self._is_behind():
            if self._in_flight:
                self._chosen = choice
                return False
            self._catch_up(length)
        self._chosen = None
        fair = not self._round.is_new(count, length)
        if not fair:
            # The host builds while the device computes, and may be the slower one.
            self._in_flight = [one._replace(fair=False) for one in self._in_flight]
        self._state, result = self._round(self._state, draft_tokens=count, length=length)
        built_s = time.perf_counter()
        mx.async_eval(result, self._state)
        now_s = time.perf_counter()
        parked = self.controller.parked() if self.controller and not count else None
        self._in_flight.append(InFlight(choice, result, fair, parked, now_s, now_s - built_s))
        return True

    def _is_behind(self) -> bool:
        """Whether the draft has not read what rounds without proposals have written."""
        if self._in_flight:
            return self._in_flight[-1].choice.draft_tokens == 0
        return self._drafted_to < len(self.text) - 2

    def _catch_up(self, length: int) -> None:
        missed = self.text[self._drafted_to : -2]
        self._state = self._round.caught_up(self._state, missed, self._drafted_to, length)
        self._stopwatch.stop()
