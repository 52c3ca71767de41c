"""From committed tokens to events: tokens become text, ends are found, the result grows."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mlxspec.calling import Called
from mlxspec.decode.request import Request
from mlxspec.decode.track import Committed
from mlxspec.metrics import Event, FinishReason, Generation, Logprob, Piece, SpeculationStats
from mlxspec.text import TextStream
from mlxspec.tokens import Tokenizer


class Writer:
    """Writes the text of one request.

    Args:
        request: the request. tokenizer: None writes ids alone.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        sampling, count = request.sampling, request.draft_tokens
        stats = SpeculationStats(count, enabled=count > 0, rule=sampling.rule, auto=request.auto)
        self.request = request
        self.generation = Generation(len(request.tokens), stats, sampling)
        self._text = None
        if tokenizer is not None:
            self._text = TextStream(
                tokenizer,
                continues=request.continues,
                stop=request.stop,
                reasoning=request.reasoning,
                calling=request.calling,
            )

    def write(self, committed: Committed, *, done: bool, decode_s: float) -> Event:
        """The event of one round, which the generation has then.

        Args:
            done: whether the limit is reached. decode_s: seconds since the prompt was read.
        """
        event = self._event(committed, done)
        timing = self.generation.timing
        timing.decode_s = decode_s
        timing.time_to_first_token_s = timing.time_to_first_token_s or timing.prefill_s + decode_s
        self.generation.peak_gb = mx.get_peak_memory() / 1e9
        if self._text is not None:
            self.generation.reasoning_tokens = self._text.reasoning_tokens
            self.generation.stopped_by = self._text.stopped_by
        self.generation.add(event)
        return event

    def _event(self, committed: Committed, done: bool) -> Event:
        assert committed.stats is not None
        tokens, origins, pieces, logprobs, finish = self._told(committed)
        cut = len(tokens) < len(committed.tokens)
        if finish is None and done:
            finish = "length"
        notes = committed.notes
        if finish is not None and self._text:
            pieces += self._text.finish(cut=finish == "length")
            finish = "stop" if self._text.stopped else finish
            notes += self._text.remarks(finish)
        stats = replace(committed.stats, full=committed.stats.full and not cut)
        calls = [call for piece in pieces if isinstance(piece, Called) for call in piece.calls]
        return Event(
            tuple(tokens),
            tuple(origins),
            tuple(pieces),
            stats,
            finish,
            notes,
            logprobs=tuple(logprobs),
            tool_calls=tuple(calls),
        )

    def _told(
        self, committed: Committed
    ) -> tuple[list[int], list[bool], list[Piece], list[Logprob], FinishReason | None]:
        """The tokens up to an end, whether each was proposed, their text, how likely each was,
        and how they end.
        """
        assert committed.stats is not None
        tokens: list[int] = []
        origins: list[bool] = []
        pieces: list[Piece] = []
        logprobs: list[Logprob] = []
        finish: FinishReason | None = None
        for index, token in enumerate(committed.tokens):
            if token in self.request.ends:
                finish = "stop"
                break
            # Every token of a round but the target's last was proposed.
            from_draft = index < committed.stats.accepted
            tokens.append(token)
            origins.append(from_draft)
            pieces += self._text.add(token, from_draft) if self._text else []
            if committed.logprobs:
                place = self._text.place if self._text else "text"
                logprobs.append(replace(committed.logprobs[index], place=place))
            if self._text and self._text.stopped:
                finish = "stop"
                break
        return tokens, origins, pieces, logprobs, finish
