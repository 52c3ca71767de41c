"""Where the end of a text occurred before in it, and what followed there.

Looking up the last tokens in the text so far is prompt lookup decoding; taking the longest match,
and what most of its places agree on, is the idea of SuffixDecoding (arXiv 2411.04975). In place of
a suffix tree there are chains of equal n-grams of a few lengths, so that neither a token's cost nor
the memory depends on what the text is like.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

LENGTHS = (16, 6, 2)  # of the n-grams that are indexed
SHORTEST, LONGEST = LENGTHS[-1], 64
PLACES = 16
CAPACITY = 1 << 17  # at some 350 bytes each


class Match(NamedTuple):
    """What followed where the end of the text occurred before.

    `length` is how many of its last tokens occurred there, SHORTEST to LONGEST; 0 without a match.
    """

    tokens: tuple[int, ...]
    length: int


class SuffixIndex:
    """An index over a growing text of token ids, non-negative numbers of any size.

    Args:
        capacity: how many of the last tokens are remembered, at least LONGEST.
    """

    def __init__(self, *, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._tokens: list[int] = []  # the last of the text: `capacity`, and fewer than that more
        self._end = 0  # length of the text
        self._ngrams = [_Ngrams(length, capacity) for length in LENGTHS]

    def extend(self, tokens: Sequence[int]) -> None:
        """Add to the text. What a token costs does not depend on the text."""
        for token in tokens:
            self._add(token)

    def continuation(self, limit: int) -> Match:
        """`limit` tokens that are to follow the text; none without a match.

        Of the n-grams that end the text, the longest of LENGTHS tokens that occurred before is
        looked at in its PLACES most recent earlier places. Those count where the most tokens, up to
        LONGEST, equal the end of the text. Each next token is the one with which most of them go
        on, in a tie the most recent place's; the others drop out. A place near the end of the text
        goes on into what is proposed, so that a period is continued.
        """
        for ngrams in self._ngrams:
            found = [(self._length(place), place) for place in self._places(ngrams)]
            length = max((length for length, _ in found), default=0)
            if length >= ngrams.length:  # not so where n-grams share a hash, or half is forgotten
                paths = [self._after(place, limit) for one, place in found if one == length]
                return Match(_agreed(paths, limit), length)
        return Match((), 0)

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        self._end += 1
        for ngrams in self._ngrams:
            # Fewer tokens at the beginning of the text, which equal no n-gram.
            ngrams.add(hash(tuple(self._tokens[-ngrams.length :])), self._end)
        if self._end > self._capacity:
            self._forget()

    def _forget(self) -> None:
        """Forget the n-grams that begin with the token that is now one too many."""
        begin = len(self._tokens) - self._capacity - 1
        for ngrams in self._ngrams:
            key = hash(tuple(self._tokens[begin : begin + ngrams.length]))
            ngrams.forget(key, self._oldest - 1 + ngrams.length)
        if len(self._tokens) == 2 * self._capacity:
            del self._tokens[: self._capacity]

    @property
    def _oldest(self) -> int:
        """Where the first token stands that is remembered."""
        return max(self._end - self._capacity, 0)

    def _places(self, ngrams: _Ngrams) -> Iterator[int]:
        return islice(ngrams.before(self._end, self._oldest), PLACES)

    def _after(self, place: int, limit: int) -> list[int]:
        begin = len(self._tokens) - (self._end - place)
        return self._tokens[begin : begin + limit]

    def _length(self, place: int) -> int:
        """How many tokens before `place` equal the last of the text."""
        tokens, distance = self._tokens, self._end - place
        for length in range(min(LONGEST, place - self._oldest)):
            if tokens[-1 - length] != tokens[-1 - length - distance]:
                return length
        return min(LONGEST, place - self._oldest)


class _Ngrams:
    """The places of n-grams of one length: how many tokens of the text there are up to its end."""

    def __init__(self, length: int, capacity: int) -> None:
        self.length = length
        self._last: dict[int, int] = {}
        # The place before each of the last `capacity` places; 0 is none.
        self._before = array("q", [0]) * capacity

    def add(self, key: int, place: int) -> None:
        self._before[place % len(self._before)] = self._last.get(key, 0)
        self._last[key] = place

    def forget(self, key: int, place: int) -> None:
        if self._last[key] == place:
            del self._last[key]

    def before(self, place: int, oldest: int) -> Iterator[int]:
        """Earlier places of the n-gram at `place` beyond `oldest`, most recent first."""
        while (place := self._before[place % len(self._before)]) > oldest:
            yield place


def _agreed(paths: list[list[int]], limit: int) -> tuple[int, ...]:
    """What most of the `paths` say, the first in a tie; each goes on with what was said."""
    said: list[int] = []
    for step in range(limit):
        nexts = [path[step] if step < len(path) else said[step - len(path)] for path in paths]
        ((token, _),) = Counter(nexts).most_common(1)
        paths = [path for path, one in zip(paths, nexts, strict=True) if one == token]
        said.append(token)
    return tuple(said)
