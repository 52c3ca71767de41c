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

LENGTHS = (16, 6, 2, 1)  # of the n-grams that are indexed
LONGEST = 64
PLACES = 16
CAPACITY = 1 << 17  # at some 400 bytes each


class Match(NamedTuple):
    """What followed where the end of the text occurred before.

    `length` is how many of its last tokens occurred there, at most LONGEST; `place` is how many
    tokens stand before the one that followed, in the most recent of the places that agree on it.
    """

    token: int
    length: int
    place: int


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

    def __len__(self) -> int:
        """The length of the text, what is forgotten included."""
        return self._end

    def extend(self, tokens: Sequence[int]) -> None:
        """Add to the text. What a token costs does not depend on the text."""
        for token in tokens:
            self._add(token)

    def match(self, ahead: Sequence[int] = (), *, since: int = 0) -> Match | None:
        """What is to follow the text, if the tokens `ahead` do first; None without a match.

        Of the n-grams that end the text with what is ahead, the longest of LENGTHS tokens that
        occurred in the text before is looked at in its PLACES most recent places with more than
        `since` tokens before them. Those count where the most tokens, up to LONGEST, equal the
        end; and the next token is the one that followed at most of them, in a tie the most
        recent place's. A place near the end of the text is followed by what is ahead, so that a
        period is continued.
        """
        tail = [*self._tokens[-LONGEST:], *ahead][-LONGEST:]
        since = max(since, self._oldest)
        for ngrams in self._ngrams:
            if ngrams.length > len(tail):
                continue
            places = ngrams.places(tail, since)
            # The text's own end is not a place before it.
            earlier = (place for place in places if place < self._end + len(ahead))
            found = [(self._length(place, tail), place) for place in islice(earlier, PLACES)]
            length = max((length for length, _ in found), default=0)
            if length >= ngrams.length:  # not so where n-grams share a hash, or half is forgotten
                longest = [place for one, place in found if one == length]
                token, place = self._agreed(longest, ahead)
                return Match(token, length, place)
        return None

    def _agreed(self, places: list[int], ahead: Sequence[int]) -> tuple[int, int]:
        """The token that follows at most of the places, and the first of those."""
        tokens = [self._after(place, ahead) for place in places]
        ((token, _),) = Counter(tokens).most_common(1)
        return token, places[tokens.index(token)]

    def _after(self, place: int, ahead: Sequence[int]) -> int:
        if place >= self._end:
            return ahead[place - self._end]
        return self._tokens[place - self._end]

    def _length(self, place: int, tail: list[int]) -> int:
        """How many tokens before `place` equal the last of `tail`."""
        tokens, end = self._tokens, len(self._tokens) - (self._end - place)
        most = min(LONGEST, place - self._oldest, len(tail))
        # In a period all are equal, and slices are compared at once.
        if tokens[end - most] == tail[-most] and tokens[end - most : end] == tail[-most:]:
            return most
        for length in range(1, most + 1):
            if tokens[end - length] != tail[-length]:
                return length - 1
        return most

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        self._end += 1
        for ngrams in self._ngrams:
            # Fewer tokens at the beginning of the text, which equal no n-gram.
            ngrams.add(self._tokens[-ngrams.length :], self._end)
        if self._end > self._capacity:
            self._forget()

    def _forget(self) -> None:
        """Forget the n-grams that begin with the token that is now one too many."""
        begin = len(self._tokens) - self._capacity - 1
        for ngrams in self._ngrams:
            ngram = self._tokens[begin : begin + ngrams.length]
            ngrams.forget(ngram, self._oldest - 1 + ngrams.length)
        if len(self._tokens) == 2 * self._capacity:
            del self._tokens[: self._capacity]

    @property
    def _oldest(self) -> int:
        """Where the first token stands that is remembered."""
        return max(self._end - self._capacity, 0)


class _Ngrams:
    """The places of n-grams of one length: how many tokens of the text there are up to its end."""

    def __init__(self, length: int, capacity: int) -> None:
        self.length = length
        self._last: dict[int, int] = {}
        # The place before each of the last `capacity` places; 0 is none.
        self._before = array("q", [0]) * capacity

    def add(self, ngram: list[int], place: int) -> None:
        key = hash(tuple(ngram))
        self._before[place % len(self._before)] = self._last.get(key, 0)
        self._last[key] = place

    def forget(self, ngram: list[int], place: int) -> None:
        key = hash(tuple(ngram))
        if self._last[key] == place:
            del self._last[key]

    def places(self, tail: list[int], since: int) -> Iterator[int]:
        """The places beyond `since` of the n-gram at the end of `tail`, most recent first."""
        place = self._last.get(hash(tuple(tail[-self.length :])), 0)
        while place > since:
            yield place
            place = self._before[place % len(self._before)]
