"""The cost of rounds by the rows of the target's pass, from what was measured at any B and K.

A round of B texts and K proposals is one pass over B(K + 1) rows. So rounds of other B tell what
one costs that was never run, until its own cost is known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise
from statistics import fmean

from mlxspec.control.estimates import TEXT, Knowledge

# The assumed share of a plain round that one draft step takes, and a pass that drafts a block.
DRAFT_STEP, BLOCK_PASS = 0.1, 0.3


class Surface:
    """Expects C(B, K)/C(B, 0) from rounds of any B.

    Args:
        known: the costs of each drafter in seconds, by B.
        at_once: the drafters of which one pass drafts all tokens, whatever K is.
    """

    def __init__(
        self, known: Mapping[int, Mapping[str, Knowledge]], at_once: Collection[str] = ()
    ) -> None:
        self._at_once = at_once
        found: dict[int, list[float]] = {}
        for rows, drafters in known.items():
            for name, one in drafters.items():
                plain, *others = one.costs or (None,)
                if not plain:
                    continue
                found.setdefault(rows, []).append(plain)
                for k, cost in enumerate(others, 1):
                    if cost:
                        drafting = self._drafting(name, k) * plain
                        found.setdefault(rows * (k + 1), []).append(cost - drafting)
        self._points: list[tuple[int, float]] = []  # seconds by rows of a pass, never falling
        highest = 0.0
        for rows, seconds in sorted(found.items()):
            highest = max(highest, fmean(seconds))
            self._points.append((rows, highest))

    def reaches(self, rows: int) -> bool:
        """Whether passes of nearly so many rows were measured."""
        return len(self._points) > 1 and 2 * self._points[-1][0] > rows

    def curve(self, rows: int, name: str, most: int) -> list[float] | None:
        """C(B, K)/C(B, 0) for K = 0 … `most`; None where too little is known."""
        if not self.reaches(2 * rows):
            return None
        plain = self._seconds(rows)
        return [1.0] + [
            self._seconds(rows * (k + 1)) / plain + self._drafting(name, k)
            for k in range(1, most + 1)
        ]

    def _drafting(self, name: str, count: int) -> float:
        """The assumed share of a plain round in which `count` tokens are drafted."""
        if name == TEXT:
            return 0.0
        return BLOCK_PASS if name in self._at_once else count * DRAFT_STEP

    def _seconds(self, rows: int) -> float:
        """Between what was measured along lines; beyond it in proportion to the rows."""
        (first, low), (last, high) = self._points[0], self._points[-1]
        if rows <= first:
            return low
        if rows >= last:
            return high * rows / last
        (a, low), (b, high) = next(two for two in pairwise(self._points) if rows <= two[1][0])
        return low + (high - low) * (rows - a) / (b - a)
