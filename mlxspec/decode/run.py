"""A generation in progress: rounds become text, ends are found, time is taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Generator
from dataclasses import replace

import mlx.core as mx

from mlxspec.decode.session import Session
from mlxspec.metrics import Event, FinishReason, Generation, Piece
from mlxspec.text import TextStream


class Run:
    """An iterator of events, with the result so far beside it.

    Args:
        begin: reads the prompt and returns the session; called at the first event.
        generation: what to add to.
        text: turns tokens into text, or None for ids alone.
        ends: token ids that end the text and are not part of it.
        over: called with the session when no more events follow, however the run ended.
    """

    def __init__(
        self,
        begin: Callable[[], Session],
        generation: Generation,
        text: TextStream | None,
        ends: Container[int],
        over: Callable[[Session], None],
    ) -> None:
        self.generation = generation
        self.session: Session | None = None
        self._begin = begin
        self._text = text
        self._ends = ends
        self._over = over

    def __iter__(self) -> Generator[Event, None, None]:
        started = time.perf_counter()
        timing = self.generation.timing
        mx.reset_peak_memory()
        session = self.session = self._begin()
        prefilled = time.perf_counter()
        timing.prefill_s = prefilled - started
        finished: FinishReason | None = None
        try:
            while finished is None:
                event = self._event(session)
                finished = event.finish_reason
                timing.decode_s = time.perf_counter() - prefilled
                timing.time_to_first_token_s = timing.time_to_first_token_s or (
                    timing.prefill_s + timing.decode_s
                )
                self.generation.peak_gb = mx.get_peak_memory() / 1e9
                self.generation.add(event)
                yield event
        finally:
            session.close()
            self._over(session)

    def _event(self, session: Session) -> Event:
        """Commit one round and say what became of its tokens."""
        committed = session.step()
        stats = session.stats
        assert stats is not None
        tokens: list[int] = []
        origins: list[bool] = []
        pieces: list[Piece] = []
        finish: FinishReason | None = None
        for index, token in enumerate(committed):
            if token in self._ends:
                finish = "stop"
                break
            # Every token of a round but the target's last was proposed.
            from_draft = index < stats.accepted
            tokens.append(token)
            origins.append(from_draft)
            pieces += self._text.add(token, from_draft) if self._text else []
            if self._text and self._text.stopped:
                finish = "stop"
                break
        cut = len(tokens) < len(committed)
        if finish is None and session.done:
            finish = "length"
        if finish is not None and self._text:
            pieces += self._text.finish()
            finish = "stop" if self._text.stopped else finish
        stats = replace(stats, full=stats.full and not cut)
        notes = tuple(session.notes)
        session.notes.clear()
        return Event(tuple(tokens), tuple(origins), tuple(pieces), stats, finish, notes)
