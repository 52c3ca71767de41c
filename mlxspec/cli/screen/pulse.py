"""A beat for what is on the screen: where nothing happens, it shows that something is awaited."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

QUIET_S = 0.4  # a person who sees nothing move for half a second begins to wonder
EVERY_S = 0.1


class Pulse:
    """Calls `beat` from a thread of its own while nothing else happens.

    Args:
        beat: gets the seconds since something happened last.
    """

    def __init__(self, beat: Callable[[float], None]) -> None:
        self._beat = beat
        self._last_s = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def happened(self) -> None:
        """Note that something moved on the screen."""
        self._last_s = time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            quiet_s = time.monotonic() - self._last_s
            if quiet_s >= QUIET_S:
                self._beat(quiet_s)
