"""The rows of a state and the texts in them: joining, leaving, and room for all.

There are 1, 2, 4, 8, … rows, because each number is a graph to trace. A text that joins is written
into a free row: nobody else's keys, values or states are copied, unless the number of rows changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import Given, RoundState, Shape, chosen, placed
from mlxspec.decode.track import Track
from mlxspec.device import lengths
from mlxspec.drafters.graph import UNREAD
from mlxspec.models.caches.layers import capacity_of

PATIENCE = 4


class Slots:
    """The device's latest state, and the text in each of its rows.

    Args:
        rounds: the rounds that move the state on.
    """

    def __init__(self, rounds: FusedRound) -> None:
        self.tracks: list[Track | None] = []  # by row
        self.rounds = rounds
        self._state: RoundState | None = None
        self._idle = 0  # rounds in a row in which half of the rows were free

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.tracks)

    @property
    def state(self) -> RoundState:
        assert self._state is not None
        return self._state

    @property
    def top(self) -> int | None:
        """The most alternatives that a text asks for; None where none asks for logprobs."""
        asked = [track.request.logprobs for track in self.tracks if track is not None]
        return max((top for top in asked if top is not None), default=None)

    def join(self, track: Track, state: RoundState) -> None:
        """Put a text into a free row, with its state of one row."""
        state = self.rounds.fitted(state)
        if self._state is None:
            self.tracks, self._state = [track], state
            return
        if None not in self.tracks:
            self._resize(2 * self.count)
        row = self.tracks.index(None)
        self.tracks[row] = track
        self._write(row, state)

    def use(self, rounds: FusedRound) -> None:
        """Go on with other rounds of the same models."""
        self.rounds = rounds
        if self._state is not None:
            self._state = rounds.fitted(self._state)

    def keep(self, track: Track) -> None:
        """Let the past of a text outlast it, unless an interrupt in a round took the state away."""
        if self._state is not None:
            track.leave(self._state, self.tracks.index(track))

    def leave(self, track: Track) -> None:
        """Free a text's row."""
        self.keep(track)
        row = self.tracks.index(track)
        self.tracks[row] = None
        if all(track is None for track in self.tracks):
            self.clear()
        elif self._state is not None:
            self._reset(row)

    def shrink(self) -> bool:
        """Note a round, and do with half the rows once half of them were free for PATIENCE rounds.

        Others may be about to join; and a number of rows is a graph to trace.
        """
        taken = self.count - self.tracks.count(None)
        self._idle = self._idle + 1 if 2 * taken <= self.count and self.count > 1 else 0
        if self._idle <= PATIENCE:
            return False
        self._resize(self.count // 2)
        return True

    def clear(self) -> None:
        """Free every row, and drop the state."""
        self.tracks, self._state = [], None

    def run(self, shape: Shape, given: Given) -> mx.array:
        """Build a round from the state, which moves on; returns the round's result."""
        state, self._state = self.state, None  # a reference would make the round copy its caches
        self._state, result = self.rounds.run(state, shape, given, top=self.top or 0)
        return result

    def room_for(self, bounds: Mapping[Track, int]) -> int:
        """Make room with the target for texts of these lengths; returns the entries to attend."""
        length = lengths.attended(max(bounds.values()))
        if length > self.rounds.room(self.state):
            self._state = self.rounds.grown(self.state, lengths.reserved(length))
        return length

    def draft_room_for(self, name: str, bounds: Mapping[Track, int]) -> int:
        """The same with a drafter; the caches of a head grow with the target's.

        Beside others a draft attends over as many entries as the target: one graph to build in
        place of several.
        """
        entries = [
            track.drafts.entries(name, bound)
            for track, bound in bounds.items()
            if name in track.drafts.read
        ]
        alone = entries if self.count == 1 else []
        length = lengths.attended(max(alone or bounds.values()))
        if entries and length > capacity_of(self.state.drafts[name].layers):
            past = self.state.drafts[name]
            grown = self.rounds.drafters[name].grown(past, lengths.reserved(length))
            self._state = self.state.with_draft(name, grown)
        return length

    def past(self, track: Track, name: str) -> Any:
        """A draft model's past of one text, of one row; None where it has read nothing of it."""
        if name not in track.drafts.read:
            return None
        past = self.state.drafts[name]
        return past if self.count == 1 else chosen(past, [self.tracks.index(track)])

    def put(self, track: Track, name: str, one: Any) -> None:
        """Set a draft model's past of one text, of one row."""
        state, row = self.state, self.tracks.index(track)
        if self.count == 1:
            self._state = state.with_draft(name, one)
        elif name not in state.drafts:
            self._state = state.with_draft(name, _alone(one, row, self.count))
        else:
            drafter, whole = self.rounds.drafters[name], state.drafts[name]
            whole = drafter.grown(whole, capacity_of(one.layers))
            self._state = state.with_draft(name, placed(whole, one, row))

    def _resize(self, count: int) -> None:
        """Go on with another number of rows, the texts first."""
        self._idle = 0
        kept = [row for row, track in enumerate(self.tracks) if track is not None]
        state, self._state = self.state, None
        self._state = chosen(state, (kept + [kept[0]] * count)[:count])
        self.tracks = [self.tracks[row] for row in kept] + [None] * (count - len(kept))
        for row in range(len(kept), count):
            self._reset(row)

    def _write(self, row: int, one: RoundState) -> None:
        """Put the state of one row into another's place."""
        whole, self._state = self.state, None
        whole = self.rounds.grown(whole, self.rounds.room(one))
        drafts = whole.drafts | {
            name: placed(whole.drafts[name], past, row)
            if name in whole.drafts
            else chosen(past, [0] * self.count)
            for name, past in one.drafts.items()
        }
        bare = placed(whole._replace(drafts={}), one._replace(drafts={}), row)
        self._state = bare._replace(drafts=drafts)
        self._unread(row, but=list(one.drafts))

    def _reset(self, row: int) -> None:
        """Let a row without a text stand at 0, with each drafter too: its writes need room."""
        state = self.state
        self._state = state._replace(position=_with(state.position, row, 0))

    def _unread(self, row: int, but: Sequence[str] = ()) -> None:
        """Note that the draft models, all `but` some, have read nothing of a row's text.

        They then write at their first place beside it. At the text's own they may have no room.
        """
        for name, past in self.state.drafts.items():
            if name not in but and not self.rounds.drafters[name].follows:
                past = past._replace(start=_with(past.start, row, UNREAD))
                self._state = self.state.with_draft(name, past)


def _alone(one: Any, row: int, count: int) -> Any:
    """The past of one row as that of `count` rows, of which the others are unread."""
    whole = chosen(one, [0] * count)
    start = mx.where(mx.arange(count) == row, whole.start, UNREAD)
    return whole._replace(start=start)


def _with(array: mx.array, row: int, value: int) -> mx.array:
    """[B], with another value in a row."""
    return mx.where(mx.arange(array.shape[0]) == row, value, array)
