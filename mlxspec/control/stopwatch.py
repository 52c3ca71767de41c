"""The time of rounds, measured while the next one is already under way.

The host learns that a round is over in one of two ways. Reading its result waits for it; or
dispatching it does, where a backend takes no more work than it can do soon, as MLX's does on a CPU.
Whichever waited longer marks the round's end, and the time between two ends that are marked alike
is that of the later round. Ends that are marked differently tell nothing: the host was late. A
round that waited for the one before it took the time from that one's reading to its own.
"""

from __future__ import annotations

from typing import NamedTuple


class Marks(NamedTuple):
    """The times at which dispatching and reading a round returned, and how long each waited.

    waited: whether it was dispatched only once the round before it was read.
    """

    dispatched_s: float
    dispatching_s: float
    read_s: float
    reading_s: float
    waited: bool = False


class Stopwatch:
    """Measures the rounds of one sequence, one after the other."""

    def __init__(self) -> None:
        self._last: tuple[bool, float] | None = None  # which mark, and when
        self._read_s: float | None = None

    def stop(self) -> None:
        """Forget the last round, because the next one does not follow on it."""
        self._last = self._read_s = None

    def took(self, marks: Marks, *, fair: bool) -> float | None:
        """Seconds of a round, or None where they cannot be told.

        Args:
            fair: False where the time includes building that later rounds do not need.
        """
        by_reading = marks.reading_s > marks.dispatching_s
        end = marks.read_s if by_reading else marks.dispatched_s
        last, self._last = self._last, (by_reading, end)
        read_s, self._read_s = self._read_s, marks.read_s
        if marks.waited:
            return marks.read_s - read_s if fair and read_s is not None else None
        if not fair or last is None or last[0] != by_reading or end <= last[1]:
            return None
        return end - last[1]
