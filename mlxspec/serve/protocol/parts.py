"""An answer as parts in their order: what the model thought, what it said, and what it called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mlxspec.calling import Called
from mlxspec.conversations import ToolCall
from mlxspec.metrics import Event, Generation

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Part:
    """A part, and its text so far: of a call that is its arguments as JSON.

    `index` counts the parts of an answer from 0. `is_cut` says that the model would have gone on.
    """

    index: int
    kind: Kind
    text: str = ""
    call: ToolCall | None = None
    is_cut: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of a call that is whole."""
        arguments: dict[str, Any] = json.loads(self.text)
        return arguments


class Change(NamedTuple):
    """A part begins, goes on with a text, or ends."""

    what: Literal["begins", "grows", "ends"]
    part: Part
    text: str = ""


class Parts:
    """Takes events, and tells how the parts change."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self._open: Part | None = None

    def add(self, event: Event) -> Iterator[Change]:
        """The changes that an event brings; the last event ends every part."""
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

    def _grow(self, kind: Kind, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        self._open.text += text
        yield Change("grows", self._open, text)

    def _call(self, call: ToolCall) -> Iterator[Change]:
        yield from self._begin("call", call)
        yield from self._grow("call", call.arguments)
        yield from self._end()

    def _begin(self, kind: Kind, call: ToolCall | None = None) -> Iterator[Change]:
        yield from self._end()
        self._open = Part(len(self.all), kind, call=call)
        self.all.append(self._open)
        yield Change("begins", self._open)

    def _end(self) -> Iterator[Change]:
        if self._open is not None:
            yield Change("ends", self._open)
            self._open = None


def parts_of(generation: Generation) -> list[Part]:
    """The parts of a whole answer."""
    texts: list[tuple[Kind, str]] = [
        ("reasoning", generation.reasoning),
        ("text", generation.text),
    ]
    parts = [Part(0, kind, text) for kind, text in texts if text]
    if parts and not generation.tool_calls:
        parts[-1].is_cut = generation.finish_reason != "stop"
    parts += [Part(0, "call", call.arguments, call) for call in generation.tool_calls]
    for index, part in enumerate(parts):
        part.index = index
    return parts
