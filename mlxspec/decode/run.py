"""A generation in progress: a session's rounds as events, with the time that they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import mlx.core as mx

from mlxspec.decode.session import Session
from mlxspec.decode.writer import Writer
from mlxspec.metrics import Event


class Run:
    """An iterator of events, with the result so far beside it.

    It can be consumed once. A loop that was left may be resumed where it stopped; `close` ends the
    run early.

    Args:
        writer: writes the text of a request.
        begin: returns the session; called at the first event.
        over: called with the session when no more events follow, however the run ended.
    """

    def __init__(
        self,
        writer: Writer,
        begin: Callable[[], Session],
        over: Callable[[Session], None],
    ) -> None:
        self.request = writer.request
        self.generation = writer.generation
        self.session: Session | None = None
        self._writer = writer
        self._begin = begin
        self._over = over
        self._events = self._generated()

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """End the run where it is: the result is complete up to there."""
        self._events.close()

    def _generated(self) -> Generator[Event, None, None]:
        started = time.perf_counter()
        generation, timing = self.generation, self.generation.timing
        mx.reset_peak_memory()
        session = self.session = self._begin()
        try:
            for progress in session.read():
                yield Event(prefill=progress)
            generation.cached_prompt_tokens = session.cached_tokens
            prefilled = time.perf_counter()
            timing.prefill_s = prefilled - started
            finished = False
            while not finished:
                committed = session.step()
                decode_s = time.perf_counter() - prefilled
                event = self._writer.write(committed, done=session.done, decode_s=decode_s)
                finished = event.finish_reason is not None
                yield event
        finally:
            session.close()
            self._over(session)
