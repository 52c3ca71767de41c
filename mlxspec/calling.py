"""Calls of tools apart from the text around them, while both are being written.

A call stands between a model's own marks, in the model's own language, which one of mlx-lm's
parsers reads, or the one for gpt-oss here. Text outside of the marks is never waited for, but for
what may become a mark. What cannot be read as a call is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlxspec.chats import ID_LETTERS
from mlxspec.conversations import Tool, ToolCall
from mlxspec.markup import CALL_OF_HARMONY, is_harmony
from mlxspec.metrics import Piece, Tell, silent
from mlxspec.pieces import Held, longest_beginning, split
from mlxspec.reasoning import PARAGRAPH, Reasoning
from mlxspec.tokens import Tokenizer, decodes_at_once

_START, _END = "\ufdee", "\ufdef"  # letters that no text has, for marks that are control tokens
_OF_IDS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Calling:
    """How one model calls tools.

    Args:
        start, end: the marks around one call or several; an empty end is that of the text.
        parse: the parser of what stands between them. It raises what it likes.
        tools: those that were offered.
        tokens: ids of the marks that are control tokens, each with the letter that stands for it.
            Where there are any, letters that spell a mark are text.
        several: whether a text may have several calls; otherwise it ends behind the first.
    """

    start: str
    end: str
    parse: Callable[[str, Any], Any]
    tools: Sequence[Tool]
    tokens: Mapping[int, str] = field(default_factory=dict)
    several: bool = True

    @property
    def marks(self) -> tuple[str, str]:
        """The marks as they stand in coded text."""
        return (_START, self.end and _END) if self.tokens else (self.start, self.end)

    def named(self, coded: str) -> str:
        """Coded text as the model wrote it."""
        return coded.replace(_START, self.start).replace(_END, self.end) if self.tokens else coded

    def calls_in(self, block: str) -> tuple[ToolCall, ...]:
        """The calls in what stands between two marks; none where it cannot be read."""
        try:
            parsed = self.parse(self.named(block), list(self.tools))
            found = parsed if isinstance(parsed, list) else [parsed]
            return tuple(self._call(one) for one in (found if self.several else found[:1]))
        except Exception:  # a parser's, for a text that is no call
            return ()

    def _call(self, parsed: Any) -> ToolCall:
        name, arguments = parsed["name"], parsed.get("arguments", parsed.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        offered = any(tool["function"]["name"] == name for tool in self.tools)
        # Some parsers give a text that they do not know as `raw` of any name.
        is_guess = not offered and isinstance(arguments, dict) and [*arguments] == ["raw"]
        if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
            raise ValueError("no call")
        if is_guess:
            raise ValueError("a guess")
        own = parsed.get("id")
        return ToolCall(
            name, _json_of(arguments), own if own and isinstance(own, str) else new_id()
        )


def calling_of(
    tokenizer: Tokenizer | None,
    tools: Sequence[Tool],
    reasoning: Reasoning | None = None,
    tell: Tell = silent,
    *,
    several: bool = True,
) -> Calling | None:
    """How a model calls these tools; None where there are none, or no parser is known for it.

    Args:
        reasoning: how its reasoning is told apart, which keeps its own marks.
        tell: called where calls stay in the text.
        several: whether a text may have several calls.
    """
    if not tools or tokenizer is None:
        return None
    vocabulary = tokenizer.get_vocab()
    parser = getattr(tokenizer, "tool_parser", None)
    start, end = (getattr(tokenizer, f"tool_call_{name}", None) or "" for name in ("start", "end"))
    if parser is None and is_harmony(vocabulary):
        parser, start, end = _parse_harmony, CALL_OF_HARMONY, ""
    if not start or parser is None:
        tell("no parser is known for this model's tool calls: they stay in the text")
        return None
    # A parser may rely on a schema, which a tool without parameters need not have.
    schemas = [{**tool, "function": {"parameters": {}, **tool["function"]}} for tool in tools]
    calling = Calling(start, end, parser, schemas, several=several)
    names = {start: _START} | ({end: _END} if end else {})
    tokens = {vocabulary[name]: letter for name, letter in names.items() if name in vocabulary}
    taken = reasoning.markup.tokens.keys() if reasoning is not None else set()
    if len(tokens) < len(names) or tokens.keys() & taken or not decodes_at_once(tokenizer):
        return calling
    return replace(calling, tokens=tokens)


def _parse_harmony(block: str, tools: Any) -> dict[str, Any]:
    """A call of gpt-oss: the rest of its header, which begins with a name, and its arguments."""
    name = re.match(r"[\w.-]+", block)
    return {"name": name and name[0], "arguments": json.loads(block[block.index("{") :])}


def new_id() -> str:
    return "".join(secrets.choice(_OF_IDS) for _ in range(ID_LETTERS))


@dataclass(frozen=True)
class Called(Piece):
    """In place of a piece of text: calls that ended there."""

    calls: tuple[ToolCall, ...] = ()


class Caller:
    """Takes calls out of final text; what comes out does not depend on where pieces end.

    Line ends beside a call belong to it.
    """

    def __init__(self, calling: Calling) -> None:
        self._calling = calling
        self._start, self._end = calling.marks
        self._held = Held()
        self._block: list[Piece] | None = None  # from the line ends before a mark on
        self._before = 0  # letters of the block before what stands between the marks
        self._tail = ""  # of the block, where a mark may have begun
        self._doubt = 0  # letters of the block up to behind the first mark that did not end it
        self._told: set[bool] = set()  # whether there was reasoning, and an answer
        self._behind = False  # whether the last that was told is a call
        self._is_cut = False
        self._unread = 0  # blocks that were no calls
        self.count = 0  # of calls

    @property
    def calls(self) -> bool:
        """Whether the text so far ends inside of what may be a call."""
        return self._block is not None

    def add(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The text that is final, and the calls that have ended."""
        told: list[Piece] = []
        left = deque(pieces)
        while left:
            piece = left.popleft()
            rest = self._outside(piece, told) if self._block is None else self._inside(piece, told)
            left.extendleft(reversed(rest))
        return told

    def cut(self) -> None:
        """Tell that the text ends where the model would have gone on: a block that is not whole."""
        self._is_cut = True

    def finish(self) -> list[Piece]:
        """The rest, once no text will follow."""
        told: list[Piece] = []
        while self._block is not None:
            if not (self._is_cut and self._end):
                self._close(told, "")
            if self._block is not None:
                told += self.add(self._give_back(told, self._doubt))
        return told + self._text(self._held.take_all())

    def remarks(self) -> tuple[str, ...]:
        """Lines for people about blocks that were no calls."""
        if not self._unread:
            return ()
        if self._is_cut:
            return ("the text was cut inside a tool call, which is left in the text",)
        what = "a tool call" if self._unread == 1 else f"{self._unread} tool calls"
        return (f"{what} could not be read, and stayed in the text",)

    def _outside(self, piece: Piece, told: list[Piece]) -> list[Piece]:
        """Tell text up to a mark; returns what stands behind the mark."""
        if piece.reasoning and not self._calling.tokens:
            # A model may think about calls in letters.
            told += self._text([*self._held.take_all(), piece])
            return []
        self._held.put(piece)
        held = self._held.text
        at = held.find(self._start)
        size = at if at >= 0 else len(held) - longest_beginning((self._start,), held)
        size = len(held[:size].rstrip("\n"))
        told += self._text(self._held.take(size))
        if at < 0:
            return []
        self._before = at - size + len(self._start)
        self._block, self._tail, self._doubt = self._held.take(self._before), "", 0
        return self._held.take_all()

    def _inside(self, piece: Piece, told: list[Piece]) -> list[Piece]:
        """Let a block grow; returns what stands behind it once it has ended."""
        assert self._block is not None
        mark = self._end or self._start
        text = self._tail + piece.text
        at = text.find(mark)
        if at < 0:
            self._block.append(piece)
            self._tail = text[len(text) - longest_beginning((mark,), text) :]
            return []
        first, rest = split(piece, at + len(mark) - len(self._tail))
        self._block += first
        self._tail = ""
        return [*self._close(told, mark), *rest]

    def _close(self, told: list[Piece], mark: str) -> list[Piece]:
        """End the block at a mark, where it ends there; returns what is no part of it."""
        assert self._block is not None
        text = "".join(piece.text for piece in self._block)
        inner = text[self._before :].removesuffix(mark)
        # Without a mark for the end, the next block's own has ended this one.
        size = len(text) - (0 if self._end else len(mark))
        if calls := self._calling.calls_in(inner):
            end = self._block[-1]
            told.append(Called("", end.from_draft, calls=calls))
            self.count += len(calls)
            self._block, self._behind = None, True
            return [replace(end, text=text[size:])] if text[size:] else []
        if not mark:
            return []
        if _is_in_string(inner):
            self._doubt = self._doubt or size
            return []
        return self._give_back(told, size)

    def _give_back(self, told: list[Piece], size: int = 0) -> list[Piece]:
        """Tell the first letters of a block as text, or all of it; returns the others."""
        assert self._block is not None
        held = Held()
        for piece in self._block:
            held.put(piece)
        told += self._text(held.take(size) if size else held.take_all())
        self._block = None
        self._unread += 1
        return held.take_all()

    def _text(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Pieces as they are told; a paragraph of their own behind a call."""
        told = []
        for piece in pieces:
            text = piece.text.lstrip("\n") if self._behind else piece.text
            if not text:
                continue
            if self._behind and piece.reasoning in self._told:
                text = PARAGRAPH + text
            self._told.add(piece.reasoning)
            self._behind = False
            told.append(replace(piece, text=self._calling.named(text)))
        return told


def _is_in_string(block: str) -> bool:
    """Whether a block ends inside of a string in quotes: a mark in there is a part of it."""
    return block.replace("\\\\", "").replace('\\"', "").count('"') % 2 == 1


def _json_of(arguments: Mapping[str, Any]) -> str:
    """As JSON without what JSON does not know, such as NaN."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    is_unicode = text.encode("utf-8", "replace").decode() == text
    return text if is_unicode else json.dumps(arguments, allow_nan=False)
