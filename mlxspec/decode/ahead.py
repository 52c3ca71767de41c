"""What is ahead of the texts of a lane, as a policy asks."""

from __future__ import annotations

from functools import cache
from math import inf

from mlxspec.control.policy import Outlook
from mlxspec.decode.given import sort_of
from mlxspec.decode.slots import Slots
from mlxspec.device import lengths
from mlxspec.drafters.proposals import Choice


class Ahead:
    """Tells for how many rounds a number of rows stays, and which rounds must be built first.

    waiting: the number of texts that may join; most: of those that are written at a time.

    Args:
        slots: the rows.
    """

    def __init__(self, slots: Slots) -> None:
        self.waiting, self.most = 0, 1
        self._slots = slots

    def outlook(self, bound: int) -> Outlook:
        """The outlook where no text is longer than `bound` tokens before the next round."""
        # Every draft's rounds of any K have the same reading before them: it is summed up once.
        return Outlook(
            self._left(), lambda choice: self._is_new(choice, bound), cache(self._reading_s)
        )

    def _left(self) -> float:
        """The rounds for which there are as many rows; 0 where more rows come next."""
        tracks = [track for track in self._slots.tracks if track is not None]
        if self.waiting:
            return 0.0 if len(tracks) == self._slots.count < self.most else inf
        lefts = sorted((track.left for track in tracks), reverse=True)
        return lefts[min(self._slots.count // 2, len(lefts) - 1)]

    def _reading_s(self, name: str) -> float:
        """The seconds that a drafter would read for, text by text, before it drafts for all."""
        tracks = [track for track in self._slots.tracks if track is not None]
        return sum(track.drafts.lag_s(name, track.text) for track in tracks)

    def _is_new(self, choice: Choice, bound: int) -> bool:
        """Whether a round of several rows would have to be built first."""
        slots, count = self._slots, choice.draft_tokens
        drafts = choice.drafter in slots.rounds.drafters
        length = lengths.attended(bound + count)
        given = sort_of(count, slots.tracks, drafts=drafts)
        shape = slots.rounds.shape(count, length, choice.drafter, length, given, rows=slots.count)
        return slots.rounds.is_new(shape)
