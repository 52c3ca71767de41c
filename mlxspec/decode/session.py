"""One text, decoded round by round: a lane of its own."""

from __future__ import annotations

from collections.abc import Generator

from mlxspec.control.policy import Policy
from mlxspec.decode.lane import Lane
from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import RoundState
from mlxspec.decode.track import Committed, Track
from mlxspec.device import lengths
from mlxspec.errors import OutOfMemory
from mlxspec.metrics import PrefillProgress
from mlxspec.models.prefill import finished


class Session:
    """Decodes one text.

    The first round proposes nothing: it needs the target alone, and the drafters read the prompt
    while it runs, or after it.

    Args:
        rounds: the rounds that run.
        track: the text.
    """

    def __init__(self, rounds: FusedRound, track: Track) -> None:
        self.rounds = rounds
        self.request = track.request
        self._lane = Lane(rounds, lambda _: track.policy)
        self._track = track

    @property
    def policy(self) -> Policy:
        """Chooses the drafter and K of every round."""
        return self._lane.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._lane.policy = self._track.policy = policy

    @property
    def text(self) -> list[int]:
        """The tokens so far, the prompt's included."""
        return self._track.text

    @property
    def draft_tokens(self) -> int:
        """The largest K; less than was asked for once memory ran out."""
        return self._track.draft_tokens

    @property
    def done(self) -> bool:
        """Whether the limit is reached: `step` would commit no token."""
        return self._track.left <= 0

    @property
    def drafted(self) -> list[str]:
        """The models that have drafted, by name."""
        return self._track.drafts.read

    @property
    def draft_reading_s(self) -> float:
        """The seconds that draft models have read the text for, between rounds."""
        return self._track.drafts.reading_s

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not read, because their past was held."""
        return self._track.cached_tokens

    def ahead(self, rounds: int, draft_tokens: int | None = None) -> tuple[RoundState, int]:
        """The device's latest state with room for `rounds` more rounds, and their length.

        For measurements: what is computed from it leaves the session as it was. Drafts that have
        read the text so far have room for as many. K is the session's own, unless one is given.
        """
        count = self.draft_tokens if draft_tokens is None else draft_tokens
        bound = self._lane.bound(self._track) + rounds * (count + 1)
        length = lengths.attended(bound)
        room = max(lengths.reserved(length), self.rounds.room(self._lane.state))
        state = self.rounds.grown(self._lane.state, room)
        for name in self.drafted:
            past = self.rounds.drafters[name].grown(state.drafts[name], room)
            state = state.with_draft(name, past)
        return state, length

    def read(self) -> Generator[PrefillProgress, None, None]:
        """Let the target read the prompt, piece by piece. `step` does so where nobody has."""
        if not self._lane.tracks:
            state = yield from self._track.read()
            self._lane.join(self._track, state)

    def step(self) -> Committed:
        """Commit one round.

        The next round is dispatched before this one is read. Where memory runs out, the text is
        read again and goes on with half as many proposals.

        Raises:
            OutOfMemory: plain decoding does not fit either. BrokenOutput: the target's output is
                no distribution. In both cases all that was returned before remains valid.
        """
        while True:
            finished(self.read())
            try:
                committed = self._lane.step()
                break
            except Exception as error:  # memory, or a caller's own processor, with anything
                self._lane.clear()  # a round that ends so leaves no state behind
                if not isinstance(error, OutOfMemory) or self.draft_tokens == 0:
                    raise
            self._track.shrink()
        if not committed:
            return Committed([], None, self._track.told())
        ((_, one),) = committed
        if one.error is not None:
            self._track.is_sound = False
            raise one.error
        return one

    def close(self) -> None:
        """Let what was read outlast the text, where that is wanted and not done yet."""
        if self._lane.tracks:
            self._lane.keep(self._track)
        self._track.close()
