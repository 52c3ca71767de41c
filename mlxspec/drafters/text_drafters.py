"""The text drafters of one sequence, and how well each has guessed.

Every proposal is compared with the text as it grows, in rounds of other drafters too, so that a
drafter's acceptance rate is known without a trial. Under every exact rule a token that is proposed
with certainty is kept where it is the token that is written, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlxspec.drafters.proposals import GRADES, Choice, Offer, TextDrafter
from mlxspec.metrics import Tell

# Tokens that are compared with the text, of a proposal that was not taken.
WATCHED = 4

Proposals = dict[Offer, tuple[int, ...]]


@dataclass
class _Watched:
    """A proposal that was not taken: its first tokens, of which `right` were right so far."""

    drafter: str
    grade: int
    tokens: tuple[int, ...]
    right: int = 0

    def outcome(self, token: int) -> Choice | None:
        """The choice whose outcome the text's next token decides; None while it stays open.

        `right` is then the number of its tokens that a round would have kept.
        """
        agrees = self.tokens[self.right] == token
        self.right += agrees
        if agrees and self.right < len(self.tokens):
            return None
        return Choice(self.drafter, len(self.tokens), self.grade)


class TextDrafters:
    """The drafters of one sequence, in the order in which they are asked.

    A drafter that raises is left out from then on, and an invalid proposal is cut short, so that
    a drafter can neither stop the text nor change it.

    Args:
        drafters: new ones, which have read nothing yet. vocabulary: V of the target.
        tell: called with the reason why a drafter is left out.
    """

    def __init__(self, drafters: Sequence[TextDrafter], vocabulary: int, tell: Tell) -> None:
        self._drafters = list(drafters)
        self._vocabulary = vocabulary
        self._tell = tell
        self._watched: list[_Watched] = []
        self._proposed: Proposals | None = None  # after the present text

    def __bool__(self) -> bool:
        return bool(self._drafters)

    def extend(self, tokens: Sequence[int]) -> list[tuple[Choice, int]]:
        """Let the drafters read tokens added to the text.

        Returns:
            Choices that were not run and are decided now, with how many tokens each would keep.
        """
        if not tokens:
            return []
        self._proposed = None
        for drafter in list(self._drafters):
            try:
                drafter.extend(tokens)
            except Exception as error:  # foreign code, which may raise anything
                self._leave_out(drafter, error)
        return [outcome for token in tokens for outcome in self._settled(token)]

    def proposals(self, limit: int) -> Proposals:
        """The proposals after the present text, of at most `limit` tokens each."""
        if self._proposed is None:
            asked = [(drafter, self._asked(drafter, limit)) for drafter in list(self._drafters)]
            self._proposed = {
                Offer(drafter.name, len(tokens), grade): tokens
                for drafter, (tokens, grade) in asked
                if tokens
            }
        return self._proposed

    def watch(self, taken: Choice) -> None:
        """Compare the unused proposals, all but that of `taken`, with the text to come."""
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
