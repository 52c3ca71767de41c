"""An answer as parts in their order: what the model thought, what it said, and what it called."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile, takewhile
from typing import Any, Literal, NamedTuple

from mlxspec.calling import Called
from mlxspec.conversations import ToolCall
from mlxspec.metrics import Event, Generation, Logprob, Place


@dataclass
class Part:
    """A part, and its text so far: of a call that is its arguments as JSON.

    `index` counts the parts of an answer from 0. `is_cut` says that the model would have gone on.
    `logprobs` are those of a text's tokens, where they were asked for.
    """

    index: int
    kind: Place
    text: str = ""
    call: ToolCall | None = None
    is_cut: bool = False
    logprobs: list[Logprob] = field(default_factory=list)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of a call that is whole."""
        arguments: dict[str, Any] = json.loads(self.text)
        return arguments


class Change(NamedTuple):
    """A part begins, goes on with a text and its tokens' log-probabilities, or ends."""

    what: Literal["begins", "grows", "ends"]
    part: Part
    text: str = ""
    logprobs: Sequence[Logprob] = ()


class Parts:
    """Takes events, and tells how the parts change."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self._open: Part | None = None
        self._untold: list[Logprob] = []  # text may lag behind its tokens

    def add(self, event: Event) -> Iterator[Change]:
        """The changes that an event brings; the last event ends every part."""
        self._untold += event.logprobs
        for piece in event.pieces:
            for call in piece.calls if isinstance(piece, Called) else ():
                yield from self._call(call)
            if piece.text:
                yield from self._grow("reasoning" if piece.reasoning else "text", piece.text)
        if event.finish_reason is not None:
            if event.finish_reason != "stop":
                self.cut()
            yield from self._end()

    def cut(self) -> None:
        """Note that the part that is open stays as it is."""
        if self._open is not None:
            self._open.is_cut = True

    def _grow(self, kind: Place, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        self._open.text += text
        yield Change("grows", self._open, text, self._logprobs(self._open))

    def _logprobs(self, part: Part) -> list[Logprob]:
        """Those that are known of a text by now, which the part has from here on."""
        if part.kind != "text":
            return []
        if not part.logprobs:
            self._untold = [*dropwhile(lambda one: one.place != "text", self._untold)]
        told = [*takewhile(lambda one: one.place == "text", self._untold)]
        del self._untold[: len(told)]
        part.logprobs += told
        return told

    def _skip_call(self) -> None:
        """Let those go that stand in a call, and before it in no text that was told."""
        if any(one.place == "call" for one in self._untold):
            from_it = dropwhile(lambda one: one.place != "call", self._untold)
            self._untold = [*dropwhile(lambda one: one.place == "call", from_it)]

    def _call(self, call: ToolCall) -> Iterator[Change]:
        yield from self._begin("call", call)
        self._skip_call()
        yield from self._grow("call", call.arguments)
        yield from self._end()

    def _begin(self, kind: Place, call: ToolCall | None = None) -> Iterator[Change]:
        yield from self._end()
        self._open = Part(len(self.all), kind, call=call)
        self.all.append(self._open)
        yield Change("begins", self._open)

    def _end(self) -> Iterator[Change]:
        if self._open is not None:
            if rest := self._logprobs(self._open):  # of what is no part of the text, as line ends
                yield Change("grows", self._open, "", rest)
            yield Change("ends", self._open)
            self._open = None


def parts_of(generation: Generation) -> list[Part]:
    """The parts of a whole answer."""
    of_text = [one for one in generation.logprobs if one.place == "text"]
    parts = [Part(0, "reasoning", generation.reasoning)] if generation.reasoning else []
    parts += [Part(0, "text", generation.text, logprobs=of_text)] if generation.text else []
    if parts and not generation.tool_calls:
        parts[-1].is_cut = generation.finish_reason != "stop"
    parts += [Part(0, "call", call.arguments, call) for call in generation.tool_calls]
    for index, part in enumerate(parts):
        part.index = index
    return parts
