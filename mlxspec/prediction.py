"""A drafter that follows a text which the caller expects, as in OpenAI's predicted outputs."""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlxspec.proposals import MOST, Proposal, grade

FOLLOWED = (1, 2, 6, 16)  # tokens, from which the next grade begins
REACH = (16, 64)  # tokens ahead at which a match of one token, or of two, is believed
FAR = 3  # tokens that are believed anywhere
NEAREST = 8  # places on either side that are looked at
LONGEST = 32  # tokens of a match that count
FIRM = 8  # tokens followed, after which the place is where the next search begins
GUESSES = 2


class Prediction:
    """The output is expected to be `expected`, with whatever was replaced, added, cut or moved.

    While the output follows, what comes next is proposed. After a difference it is looked for
    where in `expected` the output's last tokens are, near the place that was last followed for
    FIRM tokens: one token is enough just ahead of it, two farther ahead, FAR anywhere, and one
    more behind it. The longest match wins, then the nearest. Without one, the next GUESSES tokens
    are taken to replace as many of those expected. It is silent after that, and at the end of
    `expected`. What a token costs does not depend on how much is expected.

    The grade tells how many tokens the output has followed for, those of the match included.
    """

    def __init__(
        self, expected: Sequence[int], *, name: str = "prediction", most: int = MOST
    ) -> None:
        self.name = name
        self.most = most
        self._expected = tuple(expected)
        self._places = _places(self._expected)
        self._output: list[int] = []
        self._prompt_read = False
        self._firm = 0  # place of the last firm footing
        self._follow(0, FIRM)  # it is the caller who says that it begins here

    def extend(self, tokens: Sequence[int]) -> None:
        """The prompt at first, which says nothing of the output; then the output, bit by bit."""
        if self._prompt_read:
            for token in tokens:
                self._take(token)
        self._prompt_read = True

    def propose(self, limit: int) -> Proposal:
        """At most `limit` and `most` tokens."""
        end = self._place + min(limit, self.most)
        return Proposal(self._expected[self._place : end], grade(self._followed, FOLLOWED))

    def _take(self, token: int) -> None:
        self._output.append(token)
        if self._expected[self._place : self._place + 1] == (token,):
            self._follow(self._place + 1, self._followed + 1)
        elif match := max(self._matches(), key=_rank, default=None):
            self._follow(match.place, match.length)
        else:
            self._guess()

    def _follow(self, place: int, followed: int) -> None:
        self._place = place  # how many tokens are expected before the next one
        self._followed = followed
        self._guesses = 0
        if followed >= FIRM:
            self._firm = place

    def _guess(self) -> None:
        self._followed = 0
        self._guesses += 1
        self._place = self._place + 1 if self._guesses <= GUESSES else len(self._expected)

    def _matches(self) -> Iterator[_Match]:
        """Places after the last tokens of the output that are believed."""
        for size in (1, FAR):
            places = self._places.get(tuple(self._output[-size:]), [])
            middle = bisect(places, self._firm)
            for place in places[max(middle - NEAREST, 0) : middle + NEAREST]:
                match = _Match(self._length(place), place - 1 - self._firm, place)
                if _is_believed(match):
                    yield match

    def _length(self, place: int) -> int:
        """How many tokens of `expected` before `place` are the last of the output."""
        most = min(LONGEST, place, len(self._output))
        for length in range(most):
            if self._expected[place - 1 - length] != self._output[-1 - length]:
                return length
        return most


class _Match(NamedTuple):
    length: int
    ahead: int  # of the firm place its last token stands, in tokens; negative behind
    place: int


def _is_believed(match: _Match) -> bool:
    counted = match.length if match.ahead >= 0 else match.length - 1
    return counted >= FAR or (counted > 0 and abs(match.ahead) <= REACH[counted - 1])


def _rank(match: _Match) -> tuple[int, int, int]:
    return match.length, -abs(match.ahead), match.ahead


def _places(expected: tuple[int, ...]) -> dict[tuple[int, ...], list[int]]:
    """Every token alone, and every FAR tokens, with the places after them in ascending order."""
    places = defaultdict(list)
    for size in (1, FAR):
        for end in range(size, len(expected) + 1):
            places[expected[end - size : end]].append(end)
    return places
