"""Drafters that propose what followed earlier in the text, or follows in an expected text."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from mlxspec.defaults import PREDICTION
from mlxspec.drafters.following import Follower
from mlxspec.drafters.proposals import MOST, Proposal, grade
from mlxspec.drafters.suffix import CAPACITY, Match, SuffixIndex

# The lower bounds of the grades: of the tokens that support a proposal's first token, and of the
# tokens before its first doubtful one.
STRENGTHS, SURE = (1, 2, 4, 8), (1, 4, 8, 16)
SHORTEST = 2  # tokens that must support a doubtful one before the source was ever followed
TENTATIVE = 3  # tokens proposed after a doubtful beginning, the first one included
# A guess supported by FIRM tokens is sure. The source wins over the output's own match where it
# is supported by more than STRONGER times as many tokens.
FIRM, STRONGER = 4, 16
# Bits: the origins that would have given a token of the output; or that it was a surprise.
OWN, SOURCE, SURPRISE = 1, 2, 4


class Guess(NamedTuple):
    """A next token, the number of tokens before it that support it, and whether it is sure."""

    token: int
    strength: int
    is_sure: bool


class History:
    """Proposes text that repeats: edited code, names, quotations, lists, reformatted data.

    Two origins predict the next token: the output, by what it wrote itself after the same tokens;
    and the prompt, by what comes next where the output follows it with differences (`Follower`).
    For every token of the output it is recorded which of them was right. Where they differ, the
    one that was right at the matching place is taken: indented JSON takes its line ends from the
    last object written, and its values from the prompt. Where the record decides nothing, the
    prediction that most tokens support is taken, among them that of the whole text.

    On text that does not repeat it proposes nothing, at next to no cost.

    Args:
        capacity: the number of last tokens that it remembers.
        source: the text that the output is taken to follow, in place of the prompt.
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
        self._begin: int | None = None  # length of the prompt, once known
        self._own: Match | None = None  # the output's own match for the next token

    def extend(self, tokens: Sequence[int]) -> None:
        """Read the prompt at the first call, then the output bit by bit."""
        if self._begin is None:
            self._index.extend(tokens)
            self._begin = len(tokens)
            if self._source is None:
                self._source = Follower(tokens[-self._capacity :], begins=False)
            return
        for token in tokens:
            self._take(token, self._own)

    def propose(self, limit: int) -> Proposal:
        """Propose at most `limit` and `most` tokens."""
        guesses = self._guesses(min(limit, self.most))
        if not guesses:
            return Proposal((), 0)
        doubtful = (at for at, guess in enumerate(guesses) if not guess.is_sure)
        sure = next(doubtful, len(guesses))
        lower = min(grade(guesses[0].strength, STRENGTHS), grade(sure, SURE))
        return Proposal(tuple(guess.token for guess in guesses), lower)

    def _take(self, token: int, own: Match | None) -> None:
        """Read the output's next token."""
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
        """The next tokens, each guessed as if the ones before it were right."""
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
        """The token after the text and the tokens `ahead`, at whose end `own` matches."""
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
        """The guess of the origin that was right at the matching place, if the record decides."""
        origin = self._origins[own.place % self._capacity]
        if follower.next == own.token:
            return Guess(own.token, max(own.length, follower.followed), True)
        trusted = origin & SOURCE or follower.followed > STRONGER * own.length
        if trusted and follower.next is not None:
            return Guess(follower.next, follower.followed, True)
        return Guess(own.token, own.length, True) if origin & OWN else None


class Prediction(History):
    """Proposes an expected output, as in OpenAI's predicted outputs.

    The output is taken to begin as `expected` does, and its place is found again after every
    difference. A difference that occurred before is expected to recur.
    """

    def __init__(
        self, expected: Sequence[int], *, name: str = PREDICTION, most: int = MOST
    ) -> None:
        super().__init__(name=name, most=most, source=Follower(expected))
