"""What the draft models of one sequence have read, and what they read next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mlxspec.decode.round import FusedRound, RoundState
from mlxspec.device import lengths
from mlxspec.drafters.graph import Past
from mlxspec.models.caches.layers import capacity_of, grow

# Tokens that a draft reads back on when it reads anew, at least; and it reads anew once it has read
# twice as many, so that neither a round nor a long prompt costs it more than that.
WINDOW = 4096


class Reader(Protocol):
    """Reads a text anew. See `opening.Reader`."""

    def state(self, tokens: Sequence[int]) -> RoundState: ...

    def draft(self, name: str, tokens: Sequence[int], start: int) -> Past: ...

    def draft_seconds(self, name: str) -> float: ...

    @property
    def keeps(self) -> bool: ...

    def keep(self) -> None: ...


@dataclass
class _Reach:
    """Which stretch of the text a draft model has read, as positions."""

    start: int
    end: int


class Drafts:
    """The draft models of one sequence, by name.

    A model's next round feeds it the last two tokens of the text, so it has to have read all but
    those. Whoever runs rounds tells what was written.

    Args:
        rounds: that they draft in. reader: reads a text for them.
    """

    def __init__(self, rounds: FusedRound, reader: Reader) -> None:
        self.names = list(rounds.drafters)
        self._rounds = rounds
        self._reader = reader
        self._reached: dict[str, _Reach] = {}

    @property
    def read(self) -> list[str]:
        """The models that have read anything."""
        return list(self._reached)

    def forget(self) -> None:
        """The state was built anew: nobody has read anything."""
        self._reached.clear()

    def leave_out(self, name: str) -> None:
        self.names.remove(name)

    def wrote(self, name: str, text: Sequence[int]) -> None:
        """A round of this model was the last to add to the text."""
        self._reached[name].end = len(text) - 2

    def must_read(self, name: str, text: Sequence[int]) -> bool:
        """Whether it has to read anew: it never did, or more than two windows."""
        reach = self._reached.get(name)
        return reach is None or len(text) - 2 - reach.start > 2 * WINDOW

    def has_missed(self, name: str, text: Sequence[int]) -> bool:
        """Whether others wrote something since its last round."""
        return self._reached[name].end < len(text) - 2

    def caught_up(self, state: RoundState, name: str, text: Sequence[int]) -> RoundState:
        """`state` once a model has read what it has not.

        Raises:
            OutOfMemory: its cache does not fit; the state is as it was.
        """
        end = len(text) - 2
        if self.must_read(name, text):
            # At whole windows, so that a text that grew a little is read from the same place.
            start = max(end // WINDOW - 1, 0) * WINDOW
            past = self._reader.draft(name, text, start)
            self._reached[name] = _Reach(start, end)
            return state.with_draft(name, past)
        reach = self._reached[name]
        at, missed = reach.end - reach.start, text[reach.end : -2]
        state, length = self.with_room(state, name, reach.end + len(missed))
        past = self._rounds.drafters[name].read(state.drafts[name], missed, at, length)
        reach.end = end
        return state.with_draft(name, past)

    def with_room(self, state: RoundState, name: str, bound: int) -> tuple[RoundState, int]:
        """`state` with room in a model's caches for a text of `bound` tokens.

        Returns:
            It, and how far they are attended then.
        """
        length = lengths.attended(bound - self._reached[name].start)
        past = state.drafts[name]
        if length > capacity_of(past.layers):
            state = state.with_draft(
                name, past._replace(layers=grow(past.layers, lengths.reserved(length)))
            )
        return state, length
