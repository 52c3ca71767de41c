"""How far a measurement is, and how long the rest of it is likely to take. No MLX."""

from __future__ import annotations

import time
from collections.abc import Mapping

from mlxspec.metrics import Progress


class Schedule:
    """The parts of a measurement, one after the other, with the seconds that each should take.

    A part that has begun is expected to go on at its own pace, whatever was expected of it.

    Args:
        budget_s: the seconds from now in which all of them should be over.
    """

    def __init__(self, budget_s: float) -> None:
        self.budget_s = budget_s
        self._end = time.perf_counter() + budget_s
        self._expected: dict[str, float] = {}
        self._part, self._total = "", 1
        self._began = time.perf_counter()

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left; negative once it is spent."""
        return self._end - time.perf_counter()

    def expect(self, parts: Mapping[str, float]) -> None:
        """Set the seconds that are expected of the parts to come."""
        self._expected |= parts

    def begin(self, part: str, total: int) -> Progress:
        """Begin a part of `total` steps."""
        self._part, self._total = part, total
        self._began = time.perf_counter()
        return self.after(0)

    def after(self, done: int) -> Progress:
        """The progress when `done` steps of the part are over."""
        if not self._expected:
            return Progress(self._part, done, self._total)
        spent = time.perf_counter() - self._began
        later = [*self._expected]
        if self._part in later:
            later = later[later.index(self._part) + 1 :]
        of_part = self._expected.get(self._part, 0.0)
        rest = spent / done * (self._total - done) if done else of_part
        return Progress(
            self._part, done, self._total, rest + sum(self._expected[one] for one in later)
        )

    def late(self) -> bool:
        """Whether the part has taken far more than it should have, or the budget is spent."""
        spent = time.perf_counter() - self._began
        enough = max(2 * self._expected.get(self._part, spent), self.budget_s / 10)
        return self.left_s < 0 or spent > enough
