"""What happens, for as many listeners as like to hear it; a slow one holds back nobody."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

Happening = dict[str, Any]

FARTHEST_BEHIND = 1024  # happenings: a second or two of a busy server


class Listener:
    """One who listens, on the event loop. What it has not heard in time is lost, the oldest first.

    As a context manager it listens until the block ends.
    """

    def __init__(self, broadcast: Broadcast, farthest_behind: int) -> None:
        self._broadcast = broadcast
        self._unheard: deque[Happening] = deque(maxlen=farthest_behind)
        self._lost = 0
        self._over = False
        self._lock = threading.Lock()  # guards what is above
        self._loop = asyncio.get_running_loop()
        self._called = asyncio.Event()

    def __enter__(self) -> Self:
        self._broadcast.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._broadcast.remove(self)

    def call(self, happenings: Sequence[Happening], *, last: bool = False) -> None:
        """Say what happened; from any thread."""
        with self._lock:
            most = self._unheard.maxlen or 0
            self._lost += max(len(self._unheard) + len(happenings) - most, 0)
            self._unheard.extend(happenings)
            self._over = self._over or last
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._called.set)

    async def heard(self, timeout_s: float) -> tuple[list[Happening], int] | None:
        """What happened since the last call, and how much before it was lost.

        Returns:
            None once there is nothing to come; nothing where nothing happened for `timeout_s`.
        """
        try:
            await asyncio.wait_for(self._called.wait(), timeout_s)
        except TimeoutError:
            return [], 0
        self._called.clear()
        with self._lock:
            heard, lost = list(self._unheard), self._lost
            self._unheard.clear()
            self._lost = 0
            over = self._over and not heard
            if self._over:
                self._called.set()
        return None if over else (heard, lost)


class Broadcast:
    """Those who listen."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    def listen(self, farthest_behind: int = FARTHEST_BEHIND) -> Listener:
        """One more listener, from the moment at which its block begins."""
        return Listener(self, farthest_behind)

    def say(self, happenings: Sequence[Happening]) -> None:
        """Tell all listeners what happened; from any thread."""
        with self._lock:
            for listener in self._listeners:
                listener.call(happenings)

    def close(self) -> None:
        """Let all listeners go once they have heard what there was; for the event loop."""
        with self._lock:
            for listener in self._listeners:
                listener.call((), last=True)

    def add(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = (*self._listeners, listener)

    def remove(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = tuple(one for one in self._listeners if one is not listener)
