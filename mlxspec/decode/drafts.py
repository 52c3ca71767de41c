"""The drafters of one text in a round's graph: how far each has read, and what it reads next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxspec.decode.reader import Reader
from mlxspec.decode.round import FusedRound, RoundState
from mlxspec.device import lengths
from mlxspec.models.caches.layers import capacity_of

# The least number of last tokens that a draft reads when it reads anew. It reads anew once it has
# read more than twice as many, which bounds the cost of a round and of a long prompt.
WINDOW = 4096
ROUNDS = 3  # that a draft may be ahead of the text: two in flight, and the one that is proposed


@dataclass
class _Reach:
    """The stretch of the text that a draft model has read, as positions."""

    start: int
    end: int


class Drafts:
    """Draft models and heads by name, and how far each has read the text.

    A draft model's next round feeds it the last two tokens of the text, so it has to have read all
    but those. The session reports each write. A head follows every round, and is never behind.

    Args:
        rounds: the rounds that they draft in. reader: reads a text for them.
        most: the largest number of tokens that a round proposes.
    """

    def __init__(self, rounds: FusedRound, reader: Reader, most: int) -> None:
        self.names = list(rounds.drafters)
        self._rounds = rounds
        self._reader = reader
        self._reached: dict[str, _Reach] = {}
        self._most = most

    @property
    def read(self) -> list[str]:
        """The draft models that have read anything."""
        return list(self._reached)

    @property
    def models(self) -> list[str]:
        """The draft models, which read the text for themselves."""
        return [name for name in self.names if not self._rounds.drafters[name].follows]

    def forget(self) -> None:
        """Note that the state was built anew: no model has read anything."""
        self._reached.clear()

    def leave_out(self, name: str) -> None:
        self.names.remove(name)

    def wrote(self, name: str, text: Sequence[int]) -> None:
        """Note that a round of this drafter was the last to add to the text."""
        if name in self._reached:
            self._reached[name].end = len(text) - 2

    def is_behind(self, name: str, text: Sequence[int], before: str | None) -> bool:
        """Whether a drafter has to read before its next round.

        Args:
            before: the drafter of the round that is in flight; None where none is.
        """
        if name not in self.models:
            return False
        if self._must_read(name, text):
            return True
        return before != name if before is not None else self._has_missed(name, text)

    def caught_up(self, state: RoundState, name: str, text: Sequence[int]) -> RoundState:
        """`state` after a model has read all that it has missed.

        Raises:
            OutOfMemory: its cache does not fit; the state is as it was.
        """
        end = len(text) - 2
        if self._must_read(name, text):
            # Start at whole windows, so that a text that grew a little has the same start.
            window = self._window(name)
            start = max(end // window - 1, 0) * window
            past = self._reader.draft(name, text, start)
            self._reached[name] = _Reach(start, end)
            return state.with_draft(name, past)
        reach = self._reached[name]
        at, missed = reach.end - reach.start, text[reach.end : -2]
        state, length = self.with_room(state, name, reach.end + len(missed))
        past = self._rounds.model(name).read(state.drafts[name], missed, at, length)
        reach.end = end
        return state.with_draft(name, past)

    def with_room(self, state: RoundState, name: str, bound: int) -> tuple[RoundState, int]:
        """`state` with room in a drafter's caches for a text of `bound` tokens.

        Returns:
            The state, and the number of entries to attend over.
        """
        if name not in self._reached:  # its caches, if any, grow with the target's
            return state, lengths.attended(bound)
        length = lengths.attended(bound - self._reached[name].start)
        past = state.drafts[name]
        if length > capacity_of(past.layers):
            grown = self._rounds.drafters[name].grown(past, lengths.reserved(length))
            state = state.with_draft(name, grown)
        return state, length

    def _must_read(self, name: str, text: Sequence[int]) -> bool:
        """Whether it has to read anew: it has read nothing, or its past spans two windows."""
        reach = self._reached.get(name)
        return reach is None or len(text) - 2 - reach.start > 2 * self._window(name)

    def _window(self, name: str) -> int:
        """Tokens that a draft reads back on at least: its context has room for two, and rounds."""
        context = self._rounds.model(name).context
        if context is None:
            return WINDOW
        return min(WINDOW, max((context - ROUNDS * (self._most + 1)) // 2, context // 4, 1))

    def _has_missed(self, name: str, text: Sequence[int]) -> bool:
        """Whether others wrote something since its last round."""
        return self._reached[name].end < len(text) - 2
