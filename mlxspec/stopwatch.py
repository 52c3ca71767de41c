"""What rounds take, told from when their results are read: a round late, while the next one runs.

A read that had to wait ends when its round ends. One that did not comes some time after that: the
host was late, the time up to it is too long, and the time from it to the next read too short. So
time is taken between reads that waited. Where the host is always the slower one no read ever
waits; then the mean over a few rounds is what they take.
"""

from __future__ import annotations

from typing import NamedTuple

from mlxspec.control import Choice

WAITED = 0.1  # of the time since the last read, at least, is a wait
FEW = 4


class Took(NamedTuple):
    """Rounds that did `choice` took `seconds` each."""

    choice: Choice
    seconds: float


class Stopwatch:
    """For the rounds of one sequence.

    Args:
        in_step: whether a round is computed before the next one is built, so that every read
            comes right after its round.
    """

    def __init__(self, *, in_step: bool) -> None:
        self._in_step = in_step
        self._last_s: float | None = None
        self._since_s: float | None = None  # when the rounds began that are not accounted for
        self._rounds: list[Choice] = []
        self._idle = 0  # reads that did not wait, one after the other

    def stop(self) -> None:
        """What comes next does not follow on what was before."""
        self._last_s = self._since_s = None
        self._rounds.clear()

    def read(self, choice: Choice, *, waited_s: float, now_s: float, fair: bool) -> Took | None:
        """A round's result was read; what rounds took, where that is known now.

        Args:
            waited_s: how long reading waited. now_s: a clock.
            fair: False where something was built besides, which does not come again.
        """
        before_s, self._last_s = self._last_s, now_s
        if before_s is None or not fair:
            self._since_s = now_s if self._in_step else None
            self._rounds.clear()
            return None
        waited = self._in_step or waited_s >= WAITED * (now_s - before_s)
        self._idle = 0 if waited else self._idle + 1
        self._rounds.append(choice)
        if not waited and self._idle % FEW:
            return None
        took = None
        if self._since_s is not None and len(set(self._rounds)) == 1:
            took = Took(choice, (now_s - self._since_s) / len(self._rounds))
        self._since_s = now_s
        self._rounds.clear()
        return took
