"""A generation in progress: rounds become text, ends are found, time is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import replace

import mlx.core as mx

from mlxspec.decode.request import Request
from mlxspec.decode.session import Session
from mlxspec.decode.track import Committed
from mlxspec.metrics import Event, FinishReason, Generation, Piece, SpeculationStats
from mlxspec.text import TextStream


class Run:
    """An iterator of events, with the result so far beside it.

    It can be consumed once. A loop that was left may be resumed where it stopped; `close` ends the
    run early.

    Args:
        request: the request for the text.
        begin: returns the session; called at the first event.
        text: turns tokens into text, or None for ids alone.
        over: called with the session when no more events follow, however the run ended.
    """

    def __init__(
        self,
        request: Request,
        begin: Callable[[], Session],
        text: TextStream | None,
        over: Callable[[Session], None],
    ) -> None:
        sampling, count = request.sampling, request.draft_tokens
        stats = SpeculationStats(count, enabled=count > 0, rule=sampling.rule, auto=request.auto)
        self.request = request
        self.generation = Generation(len(request.tokens), stats, sampling)
        self.session: Session | None = None
        self._begin = begin
        self._text = text
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
            finished: FinishReason | None = None
            while finished is None:
                event = self._event(session)
                finished = event.finish_reason
                timing.decode_s = time.perf_counter() - prefilled
                timing.time_to_first_token_s = timing.time_to_first_token_s or (
                    timing.prefill_s + timing.decode_s
                )
                generation.peak_gb = mx.get_peak_memory() / 1e9
                generation.add(event)
                yield event
        finally:
            session.close()
            self._over(session)

    def _event(self, session: Session) -> Event:
        """Commit one round and return its event."""
        committed = session.step()
        assert committed.stats is not None
        tokens, origins, pieces, finish = self._told(committed)
        cut = len(tokens) < len(committed.tokens)
        if finish is None and session.done:
            finish = "length"
        notes = committed.notes
        if finish is not None and self._text:
            pieces += self._text.finish()
            finish = "stop" if self._text.stopped else finish
            notes += self._text.remarks(finish)
        stats = replace(committed.stats, full=committed.stats.full and not cut)
        return Event(tuple(tokens), tuple(origins), tuple(pieces), stats, finish, notes)

    def _told(
        self, committed: Committed
    ) -> tuple[list[int], list[bool], list[Piece], FinishReason | None]:
        """The tokens up to an end, whether each was proposed, their text, and how they end."""
        assert committed.stats is not None
        tokens: list[int] = []
        origins: list[bool] = []
        pieces: list[Piece] = []
        for index, token in enumerate(committed.tokens):
            if token in self.request.ends:
                return tokens, origins, pieces, "stop"
            # Every token of a round but the target's last was proposed.
            from_draft = index < committed.stats.accepted
            tokens.append(token)
            origins.append(from_draft)
            pieces += self._text.add(token, from_draft) if self._text else []
            if self._text and self._text.stopped:
                return tokens, origins, pieces, "stop"
        return tokens, origins, pieces, None
