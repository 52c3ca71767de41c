"""The speed at which a model reads, so that a piece of a text takes about as long as it may."""

from __future__ import annotations

from math import sqrt

# Rows of a piece. Few sizes, far apart: on one machine the same text is read in the same pieces.
SIZES = (1, 8, 32, 128, 512)
# The factor by which small pieces may slow down reading that is waited for, and how many times as
# long as it should a larger piece may take where it is tried for the sake of speed.
SLOWER, LONGER = 1.25, 3.0
# What is left of a time with every new text. A machine that was busy once is then no slow one.
AGED = 0.9
# The rows as whose reading counts what else a text takes when it is read between rounds.
BESIDE = 12


class Pace:
    """Times of a model's passes by their number of rows, as last measured.

    Pieces grow from size to size. A larger one may take no longer, where weights are what a pass
    waits for, or longer row by row. So it is tried where it would fit halfway between both.
    """

    def __init__(self) -> None:
        self._passes_s: dict[int, float] = {}
        self._is_warm = False
        self._missed_row_s: float | None = None

    @property
    def pass_s(self) -> float | None:
        """Seconds of a pass over one row; None where none was timed."""
        return self._passes_s.get(1)

    def begin(self) -> None:
        """Note that a text begins: larger pieces are tried again sooner or later."""
        for size in self._passes_s:
            if size > min(self._passes_s):
                self._passes_s[size] *= AGED

    def took(self, rows: int, seconds: float) -> None:
        """Record a piece. The first one of all also builds and loads, and tells nothing."""
        # A piece between two sizes, at the end of a text, says little about either.
        if self._is_warm and rows in SIZES:
            self._passes_s[rows] = seconds
        self._is_warm = True

    def rows(self, seconds: float, first: int, *, strict: bool = True) -> int:
        """The most rows that are expected to take `seconds`; `first` where nothing was timed.

        Args:
            strict: no piece may take longer. Otherwise one does where smaller pieces are known to
                slow down the whole reading.
        """
        if not self._passes_s:
            return first
        largest = max(self._passes_s)
        fits = max((s for s in SIZES if s <= largest and self._hoped_s(s) <= seconds), default=1)
        if not strict:
            fits = max(fits, self._frugal())
        if fits == largest:
            longest_s = seconds if strict else LONGER * seconds
            larger = next((size for size in SIZES if size > largest), largest)
            return larger if self._hoped_s(larger) <= longest_s else fits
        return fits

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

    def caught_up(self, rows: int, texts: int, seconds: float) -> None:
        """Record that reading `rows` that were missed, of so many texts, took `seconds` in all."""
        row_s = max(seconds, 0.0) / (rows + BESIDE * texts)
        before = row_s if self._missed_row_s is None else self._missed_row_s
        self._missed_row_s = (before + row_s) / 2

    def lag_s(self, rows: int) -> float:
        """About the seconds in which `rows` of one text that were missed are read between rounds.

        Until that was seen, a row takes as long as in the largest piece that was timed.
        """
        row_s = self._missed_row_s
        if row_s is None:
            largest = max(self._passes_s, default=1)
            row_s = self._passes_s.get(largest, 0.0) / largest
        return (rows + BESIDE) * row_s

    def _hoped_s(self, size: int) -> float:
        """The seconds of a piece: as timed, or at best about as many as the nearest one's imply."""
        if size in self._passes_s:
            return self._passes_s[size]
        above = [one for one in self._passes_s if one > size]
        if above:
            return self._passes_s[min(above)] * size / min(above)
        largest = max(self._passes_s)
        return self._passes_s[largest] * sqrt(size / largest)

    def _frugal(self) -> int:
        """The smallest size whose rows are not known to cost much more than the cheapest."""
        row_s = {size: seconds / size for size, seconds in self._passes_s.items()}
        most_s = SLOWER * min(row_s.values())
        cheap = min(size for size, one in row_s.items() if one <= most_s)
        # Below a dear one, rows cost no less; between both, nothing is known yet.
        dear = max((size for size in row_s if size < cheap), default=0)
        return next(size for size in SIZES if size > dear)
