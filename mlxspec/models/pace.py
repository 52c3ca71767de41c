"""The speed at which a model reads, so that a piece of a text takes about as long as it may."""

from __future__ import annotations

from math import sqrt

# Rows of a piece. Few sizes, far apart: on one machine the same text is read in the same pieces.
SIZES = (1, 8, 32, 128, 512)


class Pace:
    """Times of a model's passes by their number of rows, as last measured.

    Pieces grow from size to size. A larger one may take no longer, where weights are what a pass
    waits for, or longer row by row. So it is tried where it would fit halfway between both.
    """

    def __init__(self) -> None:
        self._passes_s: dict[int, float] = {}
        self._is_warm = False

    @property
    def pass_s(self) -> float | None:
        """Seconds of a pass over one row; None where none was timed."""
        return self._passes_s.get(1)

    def took(self, rows: int, seconds: float) -> None:
        """Record a piece. The first one of all also builds and loads, and tells nothing."""
        if self._is_warm:
            size = max(one for one in SIZES if one <= rows)
            self._passes_s[size] = seconds * size / rows
        self._is_warm = True

    def rows(self, seconds: float, first: int) -> int:
        """The most rows that are expected to take `seconds`; `first` where nothing was timed."""
        if not self._passes_s:
            return first
        best, largest = 1, max(self._passes_s)
        for size in SIZES:
            if size in self._passes_s:
                known_s = self._passes_s[size]
                best = size if known_s <= seconds else best
            elif size > largest:
                hoped_s = self._passes_s[largest] * sqrt(size / largest)
                return size if best == largest and hoped_s <= seconds else best
        return best

    def piece_s(self, rows: int, seconds: float) -> float:
        """The expected seconds of the next piece of `rows` or fewer; 0 where nothing was timed."""
        if not self._passes_s:
            return 0.0
        size = min(self.rows(seconds, first=1), rows)
        timed = max((one for one in self._passes_s if one <= size), default=1)
        return self._passes_s.get(timed, seconds) * size / timed

    def reading_s(self, rows: int, piece_s: float) -> float | None:
        """About the seconds that reading `rows` takes in pieces of `piece_s`.

        None where nothing was timed, or pieces may still grow.
        """
        size = self.rows(piece_s, first=1)
        return self._passes_s[size] * rows / size if size in self._passes_s else None
