"""A circuit breaker: an upstream that fails again and again is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

FAILURES = 3  # in a row
REST_S = 30.0
LONGEST_REST_S = 600.0


class Breaker:
    """Opens after failures in a row. After a rest it lets one request through, which closes it
    or doubles the rest; for any thread.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._failures = 0
        self._until_s = 0.0

    def enter(self) -> float:
        """Seconds until the upstream is asked again; 0 lets this request through."""
        with self._lock:
            now = self._clock()
            if now < self._until_s:
                return self._until_s - now
            if self._failures >= FAILURES:  # others wait for what becomes of this one
                self._until_s = now + self._rest_s()
            return 0.0

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._until_s = 0, 0.0

    def failed(self, retry_after_s: float = 0.0) -> None:
        """Count a failure.

        Args:
            retry_after_s: how long the upstream itself asks to be left alone.
        """
        with self._lock:
            self._failures += 1
            rest_s = self._rest_s() if self._failures >= FAILURES else 0.0
            self._until_s = self._clock() + max(rest_s, min(retry_after_s, LONGEST_REST_S))

    def _rest_s(self) -> float:
        return float(min(REST_S * 2 ** min(self._failures - FAILURES, 10), LONGEST_REST_S))
