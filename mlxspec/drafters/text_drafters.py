"""What proposes from the text of one sequence: several drafters, and how well each has guessed.

What a drafter proposes is held against the text as it grows, in rounds that were not its own too,
so that its acceptance is known without a trial. Under every exact rule a proposal of certainty is
kept where it is the token that is written, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxspec.drafters.proposals import GRADES, Choice, Offer, TextDrafter
from mlxspec.metrics import Tell

# Tokens of a proposal that was not taken which are held against the text.
WATCHED = 4

Proposals = dict[Offer, tuple[int, ...]]


@dataclass
class _Watched:
    """A proposal that was not taken: its first tokens, of which so many were right by now."""

    drafter: str
    grade: int
    tokens: tuple[int, ...]
    right: int = 0

    def outcome(self, token: int) -> Choice | None:
        """What came of it with the next token of the text; None while that is open.

        `right` then says how much of the choice would have been kept.
        """
        agrees = self.tokens[self.right] == token
        self.right += agrees
        if agrees and self.right < len(self.tokens):
            return None
        return Choice(self.drafter, len(self.tokens), self.grade)


class TextDrafters:
    """Drafters of one sequence, the one that is to be asked first in front.

    A drafter that raises, or says what makes no sense, is left out from then on or cut short: it
    can neither stop the text nor change it.

    Args:
        drafters: that have seen nothing yet. vocabulary: V of the target.
        tell: called with why a drafter is left out.
    """

    def __init__(self, drafters: Sequence[TextDrafter], vocabulary: int, tell: Tell) -> None:
        self._drafters = list(drafters)
        self._vocabulary = vocabulary
        self._tell = tell
        self._watched: list[_Watched] = []
        self._proposed: Proposals | None = None  # after the text as it is

    def __bool__(self) -> bool:
        return bool(self._drafters)

    def extend(self, tokens: Sequence[int]) -> list[tuple[Choice, int]]:
        """Tell what was added to the text.

        Returns:
            Rounds that were not run and are decided now, with what they would have kept.
        """
        if not tokens:
            return []
        self._proposed = None
        for drafter in list(self._drafters):
            try:
                drafter.extend(tokens)
            except Exception as error:  # it may come from anywhere, and raise anything
                self._leave_out(drafter, error)
        return [outcome for token in tokens for outcome in self._settled(token)]

    def proposals(self, limit: int) -> Proposals:
        """What is proposed after the text as it is, `limit` tokens at most each."""
        if self._proposed is None:
            asked = [(drafter, self._asked(drafter, limit)) for drafter in list(self._drafters)]
            self._proposed = {
                Offer(drafter.name, len(tokens), grade): tokens
                for drafter, (tokens, grade) in asked
                if tokens
            }
        return self._proposed

    def watch(self, taken: Choice) -> None:
        """The proposals after the text as it is are not used, but for what `taken` is."""
        for offer, tokens in (self._proposed or {}).items():
            if offer.drafter != taken.drafter:
                self._watched.append(_Watched(offer.drafter, offer.grade, tokens[:WATCHED]))
        self._proposed = {} if self._proposed else self._proposed

    def _settled(self, token: int) -> list[tuple[Choice, int]]:
        outcomes = [(one, one.outcome(token)) for one in self._watched]
        self._watched = [one for one, choice in outcomes if choice is None]
        return [(choice, one.right) for one, choice in outcomes if choice is not None]

    def _asked(self, drafter: TextDrafter, limit: int) -> tuple[tuple[int, ...], int]:
        limit = min(limit, drafter.most)
        try:
            tokens, grade = drafter.propose(limit)
            sound = []
            for token in tokens[:limit]:
                if not 0 <= int(token) < self._vocabulary:
                    break
                sound.append(int(token))
            return tuple(sound), min(max(int(grade), 0), GRADES - 1)
        except Exception as error:  # see `extend`
            self._leave_out(drafter, error)
            return (), 0

    def _leave_out(self, drafter: TextDrafter, error: Exception) -> None:
        self._drafters.remove(drafter)
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        self._tell(f"going on without the drafter {drafter.name}, which failed with {what}")
