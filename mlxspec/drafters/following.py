"""The place in a known text that an output, which follows it with differences, has reached."""

from __future__ import annotations

import copy
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

REACH = (16, 64)  # the farthest that a match of one token, or of two, is believed, in tokens
FAR = 3  # tokens of a match that is believed anywhere
NEAREST = 8  # places examined on either side
LONGEST = 32  # tokens of a match that count, at most
FIRM = 6  # tokens followed, after which the next search begins at the place reached
GUESSES = 2


class Follower:
    """Follows `expected` along an output in which parts are replaced, added, cut or moved.

    After a difference, the output's last tokens are searched for in `expected`, near the place
    that was last followed for FIRM tokens. A match of one token is enough just ahead of it, two
    farther ahead, FAR anywhere; behind it one more is needed. The longest match wins, then the
    nearest. Without a match, the next GUESSES tokens are taken to replace as many expected ones;
    after that no token is expected until there is a match again. The cost of a token does not
    depend on the length of `expected`.

    `place` is the index of the next token in `expected`; `followed` is the number of tokens that
    the output has followed, those of the match included; `is_certain` says whether it ever
    followed FIRM tokens.

    Args:
        begins: whether the output is expected to begin as `expected` does.
    """

    def __init__(self, expected: Sequence[int], *, begins: bool = True) -> None:
        self.expected = tuple(expected)
        self._places = _places(self.expected)
        self._recent: list[int] = []  # the last tokens of the output
        self._firm = 0  # place of the last firm footing
        self.is_certain = False
        if begins and self.expected:
            self._follow(0, FIRM)
        else:
            self._follow(len(self.expected), 0)

    @property
    def next(self) -> int | None:
        """The token that is expected now."""
        return self.expected[self.place] if self.place < len(self.expected) else None

    def take(self, token: int) -> None:
        """Read the output's next token."""
        self._recent.append(token)
        del self._recent[:-LONGEST]
        if self.next == token:
            self._follow(self.place + 1, self.followed + 1)
        elif match := max(self._matches(), key=_rank, default=None):
            self._follow(match.place, match.length)
        else:
            self._guess()

    def copy(self) -> Follower:
        """An independent copy."""
        other = copy.copy(self)
        other._recent = list(self._recent)
        return other

    def _follow(self, place: int, followed: int) -> None:
        self.place = place
        self.followed = followed
        self._guesses = 0
        if followed >= FIRM:
            self._firm = place
            self.is_certain = True

    def _guess(self) -> None:
        self.followed = 0
        self._guesses += 1
        self.place = self.place + 1 if self._guesses <= GUESSES else len(self.expected)

    def _matches(self) -> Iterator[_Footing]:
        """The believed places in `expected` after the output's last tokens."""
        for size in (1, FAR):
            places = self._places.get(tuple(self._recent[-size:]), [])
            middle = bisect(places, self._firm)
            for place in places[max(middle - NEAREST, 0) : middle + NEAREST]:
                match = _Footing(self._length(place), place - 1 - self._firm, place)
                if _is_believed(match):
                    yield match

    def _length(self, place: int) -> int:
        """How many tokens of `expected` before `place` equal the output's last tokens."""
        most = min(place, len(self._recent))
        for length in range(most):
            if self.expected[place - 1 - length] != self._recent[-1 - length]:
                return length
        return most


class _Footing(NamedTuple):
    length: int
    ahead: int  # tokens from the firm place to its last token; negative behind the place
    place: int


def _is_believed(match: _Footing) -> bool:
    counted = match.length if match.ahead >= 0 else match.length - 1
    return counted >= FAR or (counted > 0 and abs(match.ahead) <= REACH[counted - 1])


def _rank(match: _Footing) -> tuple[int, int, int]:
    return match.length, -abs(match.ahead), match.ahead


def _places(expected: tuple[int, ...]) -> dict[tuple[int, ...], list[int]]:
    """Every token and every run of FAR tokens, with the places after them in ascending order."""
    places = defaultdict(list)
    for size in (1, FAR):
        for end in range(size, len(expected) + 1):
            places[expected[end - size : end]].append(end)
    return places
