"""Between text and tokens: what a prompt becomes, and how committed tokens turn into text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxspec.calling import Called, Caller, Calling
from mlxspec.conversations import Message, Tool, require_unicode
from mlxspec.errors import PromptError, UsageError
from mlxspec.metrics import FinishReason, Piece, Place, Tell, silent
from mlxspec.pieces import Held, first_of, longest_beginning
from mlxspec.reasoning import Mark, Reasoning, Sorter
from mlxspec.templates import encode_chat, end_of_turn
from mlxspec.tokens import Detokenizer, Tokenizer

_CHATS = re.compile(r"(?i)(?<![a-z])(instruct|chat)(?![a-z])|-it(?![a-z])")


def encode_prompt(
    tokenizer: Tokenizer,
    text: str | Sequence[Message],
    *,
    system: str | None = None,
    tools: Sequence[Tool] = (),
    raw: bool = False,
    template_args: Mapping[str, Any] | None = None,
    tell: Tell = silent,
) -> list[int]:
    """The token ids of a user's turn, of a conversation, or of a text itself.

    Names of control tokens in a turn are text; in a raw prompt they are control.

    Args:
        text: of one turn; or the turns of a conversation, as `conversations` gives them.
        system: a system message before the turns.
        tools: that the model may call, as `conversations` gives them.
        raw: no chat template. A tokenizer that has none is always raw.
        template_args: of the chat template, such as `enable_thinking`.
        tell: called with what a person should know of how the prompt was made.

    Raises:
        PromptError: for an empty text, a system message, tools or turns that nothing can carry, a
            text that is no Unicode, or a chat template that refuses, is broken or leaves out a
            text.
    """
    turns = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    if isinstance(text, str) and not text.strip():
        raise PromptError("The prompt is empty.", hint="Give a text as argument or on stdin.")
    for what, one in (("The prompt", text), ("The system message", system)):
        if isinstance(one, str):
            require_unicode(what, one)
    if system is not None and turns[0]["role"] == "system":
        raise UsageError(
            "There are two system messages: the messages begin with one.",
            hint="Leave out one of them.",
        )
    if not is_raw(tokenizer, raw):
        begin = [] if system is None else [{"role": "system", "content": system}]
        return encode_chat(tokenizer, [*begin, *turns], tools, template_args or {}, tell)
    for given, what in (
        (system is not None, "a system message"),
        ([turn["role"] for turn in turns] != ["user"], "a conversation"),
        (tools, "tools"),
        (template_args, "arguments of a template"),
    ):
        if given:
            raise PromptError(
                f"A raw prompt has no place for {what}."
                if tokenizer.has_chat_template
                else f"The model has no chat template, and so no place for {what}.",
                hint="Leave it out, or use a model with a chat template and no --raw.",
            )
    if not raw and _is_of_chats(tokenizer):
        tell("the model's folder has no chat template: the prompt is read as it is, as with --raw")
    text, bos = str(turns[0]["content"]), tokenizer.bos_token
    return list(tokenizer.encode(text, add_special_tokens=not bos or not text.startswith(bos)))


def is_raw(tokenizer: Tokenizer, raw: bool) -> bool:
    return raw or not tokenizer.has_chat_template


def ends_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: the configuration's, and the end of a turn in the template."""
    ends = set(tokenizer.eos_token_ids)
    if tokenizer.has_chat_template:
        ends |= {token for token in (end_of_turn(tokenizer),) if token is not None}
    return frozenset(ends)


def _is_of_chats(tokenizer: Tokenizer) -> bool:
    """Whether a model without a template seems to be trained for chats, by its name."""
    parts = Path(str(getattr(tokenizer, "name_or_path", ""))).parts
    # The hub's folders are those of revisions, inside of one that has the repository's name.
    names = [part for part in parts if part.startswith("models--")] or parts[-1:]
    return any(_CHATS.search(name) for name in names)


class Stops:
    """Lets text through up to the first stop string, and holds back what may become one.

    A call of a tool, or the end of the reasoning, parts the text before it from that behind it.

    Args:
        stop: the strings. calls: whether a call of a tool ends the text too.
    """

    def __init__(self, stop: Sequence[str] = (), *, calls: bool = False) -> None:
        self.stopped = False
        self.stopped_by: str | None = None  # the string, where it was one
        self._calls = calls
        self._stop = tuple(text for text in stop if text)
        self._held = Held()
        self._reasoning = False

    def add(self, pieces: Iterable[Piece]) -> list[Piece]:
        told: list[Piece] = []
        for piece in pieces:
            if self.stopped:
                break
            if isinstance(piece, Called) or piece.reasoning != self._reasoning:
                told += self._held.take_all()
                self._reasoning = piece.reasoning
            if isinstance(piece, Called):
                told.append(piece)
                self.stopped = self._calls
                continue
            self._held.put(piece)
            told += self._released()
        return told

    def finish(self) -> list[Piece]:
        return [] if self.stopped else self._held.take_all()

    def _released(self) -> list[Piece]:
        held = self._held.text
        found = first_of(self._stop, held)
        if found is not None:
            size, self.stopped_by = found
            self.stopped = True
            return self._held.take(size)
        return self._held.take(len(held) - longest_beginning(self._stop, held))


class TextStream:
    """Turns tokens into final text, one at a time, and looks for stop strings.

    Text is held back while it could still become part of a stop string or of a mark, and while
    a character is incomplete.

    Args:
        continues: the text continues the prompt, so that a leading space belongs to it.
        stop: the text ends before the first of these, wherever tokens begin and end; in the
            reasoning too. Where tools are offered, calls and marks are no part of that text.
        reasoning: how the reasoning is told from the answer; None leaves the text as it is.
        calling: how the model calls tools; None where none are offered.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        continues: bool,
        stop: Sequence[str] = (),
        reasoning: Reasoning | None = None,
        calling: Calling | None = None,
    ) -> None:
        self.reasoning_tokens = 0
        self.place: Place = "text"  # of the latest token
        self._detokenizer = Detokenizer(tokenizer, continues=continues)
        self._reasoning = reasoning
        self._calling = calling
        self._sorter = None if reasoning is None else Sorter(reasoning.markup, reasoning.begins)
        self._caller = None if calling is None else Caller(calling)
        self._stops = Stops(stop, calls=calling is not None and not calling.several)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.stopped_by

    @property
    def stopped(self) -> bool:
        """Whether the text ended before the model ended it."""
        return self._stops.stopped

    def add(self, token: int, from_draft: bool) -> list[Piece]:
        """The text that became final with this token, and calls as `Called`."""
        before = self._here()
        pieces = self._read(token, from_draft)
        for stage in self._stages:
            pieces = stage.add(pieces)
        self.place = before if before != "text" else self._here()
        self.reasoning_tokens += self._sorter is not None and self._sorter.reasons
        return pieces

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """The rest of the text, once no token will follow.

        Args:
            cut: whether the model would have gone on.
        """
        if self._caller is not None and cut:
            self._caller.cut()
        pieces = [Piece(self._detokenizer.finish(), from_draft=False)]
        for stage in self._stages:
            pieces = [*stage.add(pieces), *stage.finish()]
        return pieces

    def remarks(self, finish: FinishReason) -> tuple[str, ...]:
        """Lines for people about how the text ended, once it has."""
        called = self._caller is not None and self._caller.count > 0
        remarks = () if self._caller is None else self._caller.remarks()
        if self._reasoning is None or self._sorter is None or not self._sorter.place or called:
            return remarks
        ended = self._reasoning.remark(self._sorter.place, finish, stopped=self.stopped)
        return (*remarks, ended)

    @cached_property
    def _stages(self) -> Sequence[Sorter | Caller | Stops]:
        """What text passes through, in order."""
        sorters = [] if self._sorter is None else [self._sorter]
        if self._caller is None:
            return [self._stops, *sorters]
        return [*sorters, self._caller, self._stops]

    def _here(self) -> Place:
        if self._caller is not None and self._caller.calls:
            return "call"
        return "text" if self._sorter is None or self._sorter.answers else "reasoning"

    def _read(self, token: int, from_draft: bool) -> list[Piece]:
        text = self._detokenizer.add(token)
        name = ""
        mark: Piece | None = None
        if self._reasoning is not None and token in self._reasoning.markup.tokens:
            name = self._reasoning.markup.tokens[token]
            mark = Mark(name, from_draft)
        elif self._calling is not None and token in self._calling.tokens:
            letter = self._calling.tokens[token]
            name, mark = self._calling.named(letter), Piece(letter, from_draft)
        if mark is None or not text.endswith(name):
            return [Piece(text, from_draft)]
        return [Piece(text.removesuffix(name), from_draft), mark]
