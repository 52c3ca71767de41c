"""What rounds take, told while the next one is already under way.

The host learns that a round is over in one of two ways. Reading its result waits for it; or
dispatching it does, where a backend takes no more work than it can do soon, as MLX's does on a CPU.
Whichever waited longer marks the round's end, and the time between two ends that are marked alike
is what the later round took. Ends that are marked differently say nothing: the host was late.
"""

from __future__ import annotations

from typing import NamedTuple


class Marks(NamedTuple):
    """Of one round: when dispatching and reading it returned, and how long each had waited."""

    dispatched_s: float
    dispatching_s: float
    read_s: float
    reading_s: float


class Stopwatch:
    """For the rounds of one sequence, one after the other."""

    def __init__(self) -> None:
        self._last: tuple[bool, float] | None = None  # which mark, and when

    def stop(self) -> None:
        """The next round does not follow on the last one."""
        self._last = None

    def took(self, marks: Marks, *, fair: bool) -> float | None:
        """Seconds of a round, or None where they cannot be told.

        Args:
            fair: False where something was built besides, which does not come again.
        """
        by_reading = marks.reading_s > marks.dispatching_s
        end = marks.read_s if by_reading else marks.dispatched_s
        last, self._last = self._last, (by_reading, end)
        if not fair or last is None or last[0] != by_reading or end <= last[1]:
            return None
        return end - last[1]
