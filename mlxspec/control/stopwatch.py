"""The time of rounds, measured while the next one is already under way.

The host learns that a round is over in one of two ways. Reading its result waits for it; or
dispatching it does, where a backend takes no more work than it can do soon, as MLX's does on a CPU.
Whichever waited longer marks the round's end, and the time between two ends that are marked alike
is that of the later round. Ends that are marked differently tell nothing: the host was late.
"""

from __future__ import annotations

from typing import NamedTuple


class Marks(NamedTuple):
    """The times at which dispatching and reading a round returned, and how long each waited."""

    dispatched_s: float
    dispatching_s: float
    read_s: float
    reading_s: float


class Stopwatch:
    """Measures the rounds of one sequence, one after the other."""

    def __init__(self) -> None:
        self._last: tuple[bool, float] | None = None  # which mark, and when

    def stop(self) -> None:
        """Forget the last round, because the next one does not follow on it."""
        self._last = None

    def took(self, marks: Marks, *, fair: bool) -> float | None:
        """Seconds of a round, or None where they cannot be told.

        Args:
            fair: False where the time includes building that later rounds do not need.
        """
        by_reading = marks.reading_s > marks.dispatching_s
        end = marks.read_s if by_reading else marks.dispatched_s
        last, self._last = self._last, (by_reading, end)
        if not fair or last is None or last[0] != by_reading or end <= last[1]:
            return None
        return end - last[1]
