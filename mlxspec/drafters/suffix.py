"""Earlier occurrences of the end of a text, and the tokens that followed them.

Looking up the last tokens in the text so far is prompt lookup decoding; taking the longest match,
and the token that most of its places agree on, is the idea of SuffixDecoding (arXiv 2411.04975).
In place of a suffix tree there are chains of equal n-grams of a few lengths, so that neither the
cost of a token nor the memory depends on the text's content.
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
CAPACITY = 1 << 17  # tokens, at some 400 bytes each


class Match(NamedTuple):
    """The token that followed where the end of the text occurred before.

    `length` is the number of last tokens that occurred there, at most LONGEST; `place` is the
    number of tokens before the one that followed, at the most recent place that agrees on it.
    """

    token: int
    length: int
    place: int


class SuffixIndex:
    """An index over a growing text of token ids, non-negative numbers of any size.

    Args:
        capacity: the number of last tokens that are remembered, at least LONGEST.
    """

    def __init__(self, *, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._tokens: list[int] = []  # the last ones: `capacity`, and fewer than that more
        self._end = 0  # length of the text
        self._ngrams = [_Ngrams(length, capacity) for length in LENGTHS]

    def __len__(self) -> int:
        """The length of the text, forgotten tokens included."""
        return self._end

    def extend(self, tokens: Sequence[int]) -> None:
        """Add to the text. The cost of a token does not depend on the text."""
        for token in tokens:
            self._add(token)

    def match(self, ahead: Sequence[int] = (), *, since: int = 0) -> Match | None:
        """The token that follows the text and then the tokens `ahead`; None without a match.

        Of the n-grams of LENGTHS tokens that end the text with `ahead`, the longest that occurred
        before is examined, at its PLACES most recent places with more than `since` tokens before
        them. Only the places count where the most tokens, up to LONGEST, equal the end. The
        result is the token that followed most of them; in a tie, that of the most recent place.
        A place near the end of the text is followed by `ahead`, so that a period is continued.
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
            if length >= ngrams.length:  # fails where n-grams share a hash, or are half forgotten
                longest = [place for one, place in found if one == length]
                token, place = self._agreed(longest, ahead)
                return Match(token, length, place)
        return None

    def _agreed(self, places: list[int], ahead: Sequence[int]) -> tuple[int, int]:
        """The token that follows most of the places, and the first of those places."""
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
        # In a period all are equal, and slices compare fast.
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
            # At the beginning of the text there are fewer tokens, which equal no n-gram.
            ngrams.add(self._tokens[-ngrams.length :], self._end)
        if self._end > self._capacity:
            self._forget()

    def _forget(self) -> None:
        """Forget the n-grams that begin with the oldest token, now beyond `capacity`."""
        begin = len(self._tokens) - self._capacity - 1
        for ngrams in self._ngrams:
            ngram = self._tokens[begin : begin + ngrams.length]
            ngrams.forget(ngram, self._oldest - 1 + ngrams.length)
        if len(self._tokens) == 2 * self._capacity:
            del self._tokens[: self._capacity]

    @property
    def _oldest(self) -> int:
        """The position of the first token that is remembered."""
        return max(self._end - self._capacity, 0)


class _Ngrams:
    """The places of n-grams of one length: the number of tokens in the text up to their ends."""

    def __init__(self, length: int, capacity: int) -> None:
        self.length = length
        self._last: dict[int, int] = {}
        # For each of the last `capacity` places, the place before it in its chain; 0 is none.
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
