"""Drafters that propose what followed in the text so far, or in one that is expected."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from mlxspec.drafters.following import Follower
from mlxspec.drafters.proposals import MOST, Proposal, grade
from mlxspec.drafters.suffix import CAPACITY, Match, SuffixIndex

# What a proposal's grade begins at: of its first token, how many tokens speak for it; and how many
# tokens there are before the first doubtful one.
STRENGTHS, SURE = (1, 2, 4, 8), (1, 4, 8, 16)
SHORTEST = 2  # tokens that have to speak for a doubtful one before the source was ever followed
TENTATIVE = 3  # tokens that are proposed behind a doubtful beginning, the first one included
# As many tokens speak for themselves, and so many times as many against another opinion.
FIRM, STRONGER = 4, 16
# Where a token of the output could have been taken from, as bits; or that it was a surprise.
OWN, SOURCE, SURPRISE = 1, 2, 4


class Guess(NamedTuple):
    """A next token, how many tokens before it speak for it, and whether it is hardly doubted."""

    token: int
    strength: int
    is_sure: bool


class History:
    """Text repeats itself: code that is edited, names, quotations, lists, data in another form.

    There are two opinions on what comes next. What the output itself wrote after the same tokens;
    and what the prompt goes on with, where the output follows it with differences (`Follower`). Of
    every token of the output it is remembered which of them was right. So where they differ, the
    one is taken that was right in the likewise place: JSON that is indented takes its line ends
    from the last object that was written, and the values from the prompt. Where that tells
    nothing, the opinion that most tokens speak for is taken, among them the one of the whole text.

    It is silent on text that does not repeat, at next to no cost.

    Args:
        capacity: how many of the last tokens it remembers.
        source: what the output is taken to follow, in place of the prompt.
    """

    def __init__(
        self,
        *,
        name: str = "history",
        most: int = MOST,
        capacity: int = CAPACITY,
        source: Follower | None = None,
    ) -> None:
        self.name = name
        self.most = most
        self._capacity = capacity
        self._index = SuffixIndex(capacity=capacity)
        self._origins = bytearray(capacity)  # of the output's tokens, by place
        self._source = source
        self._begin: int | None = None  # length of the prompt, once that is known
        self._own: Match | None = None  # the likewise place of the next token

    def extend(self, tokens: Sequence[int]) -> None:
        """The prompt at first; then the output, bit by bit."""
        if self._begin is None:
            self._index.extend(tokens)
            self._begin = len(tokens)
            if self._source is None:
                self._source = Follower(tokens[-self._capacity :], begins=False)
            return
        for token in tokens:
            self._take(token, self._own)

    def propose(self, limit: int) -> Proposal:
        """At most `limit` and `most` tokens."""
        guesses = self._guesses(min(limit, self.most))
        if not guesses:
            return Proposal((), 0)
        doubtful = (at for at, guess in enumerate(guesses) if not guess.is_sure)
        sure = next(doubtful, len(guesses))
        lower = min(grade(guesses[0].strength, STRENGTHS), grade(sure, SURE))
        return Proposal(tuple(guess.token for guess in guesses), lower)

    def _take(self, token: int, own: Match | None) -> None:
        """The output goes on with a token."""
        assert self._source is not None
        assert self._begin is not None
        origin = SOURCE * (self._source.next == token)
        if own is not None:
            origin |= OWN if own.token == token else SURPRISE * (own.length >= FIRM)
        self._origins[len(self._index) % self._capacity] = origin
        self._index.extend([token])
        self._source.take(token)
        self._own = self._index.match(since=self._begin)

    def _guesses(self, limit: int) -> list[Guess]:
        """What follows the text, token by token as if the ones before were right."""
        if self._begin is None or self._source is None:
            return []
        guesses: list[Guess] = []
        ahead: list[int] = []
        follower, own = self._source.copy(), self._own
        while len(ahead) < limit and (guess := self._guess(follower, own, ahead)):
            if not guesses and not guess.is_sure:
                if guess.strength < SHORTEST and not follower.is_certain:
                    break
                limit = min(limit, TENTATIVE)
            guesses.append(guess)
            ahead.append(guess.token)
            if len(ahead) < limit:
                follower.take(guess.token)
                own = self._index.match(ahead, since=self._begin)
        return guesses

    def _guess(self, follower: Follower, own: Match | None, ahead: list[int]) -> Guess | None:
        """What follows the text and the tokens that are ahead, at whose end `own` matches."""
        if own is not None and (guess := self._likewise(own, follower)):
            return guess
        guesses = []
        if follower.next is not None:
            guesses.append((follower.followed, follower.next))
        matches = (own, self._index.match(ahead))
        guesses += [(match.length, match.token) for match in matches if match is not None]
        if not guesses:
            return None
        strength, token = max(guesses, key=itemgetter(0))
        surprised = own is not None and self._origins[own.place % self._capacity] & SURPRISE
        return Guess(token, strength, strength >= FIRM and not surprised)

    def _likewise(self, own: Match, follower: Follower) -> Guess | None:
        """What is taken because of what was right in the likewise place, if that tells."""
        origin = self._origins[own.place % self._capacity]
        if follower.next == own.token:
            return Guess(own.token, max(own.length, follower.followed), True)
        trusted = origin & SOURCE or follower.followed > STRONGER * own.length
        if trusted and follower.next is not None:
            return Guess(follower.next, follower.followed, True)
        return Guess(own.token, own.length, True) if origin & OWN else None


class Prediction(History):
    """The output is expected to be `expected`, as in OpenAI's predicted outputs.

    It begins with it, and is found again after every difference; a difference that there was before
    is expected again.
    """

    def __init__(
        self, expected: Sequence[int], *, name: str = "prediction", most: int = MOST
    ) -> None:
        super().__init__(name=name, most=most, source=Follower(expected))
