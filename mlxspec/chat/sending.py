"""What of a conversation a model reads: its form, and the turns that its context has room for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from mlxspec.chat.conversation import Conversation
from mlxspec.metrics import Tell
from mlxspec.text import encode_prompt, is_raw
from mlxspec.tokens import Tokenizer

NEARLY = 0.75  # of the context, from where a person is told that it fills up
_KEPT = 0.5  # of the context, once turns are left out, so that this is not done every turn
_FOR_ANSWER = 8  # one part of so many of the context stays free for an answer


class Reader(Protocol):
    """An engine, as far as a prompt depends on it."""

    tokenizer: Tokenizer | None

    @property
    def context(self) -> int | None: ...


class Filled(NamedTuple):
    """`tokens` of a context of `context` tokens are in use."""

    tokens: int
    context: int

    @property
    def share(self) -> float:
        return self.tokens / self.context

    @property
    def is_nearly_full(self) -> bool:
        return self.share >= NEARLY


class Sending:
    """What of one conversation an engine is sent.

    Args:
        engine: has a tokenizer. template_args: of its chat template.
    """

    def __init__(self, engine: Reader, template_args: Mapping[str, Any]) -> None:
        assert engine.tokenizer is not None
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._arguments = dict(template_args)

    @property
    def has_turns(self) -> bool:
        """Whether the model knows of turns; one that does not goes on with the text."""
        return not is_raw(self._tokenizer, raw=False)

    def options(self, conversation: Conversation, question: str) -> dict[str, Any]:
        """The prompt, as `Engine.request` takes it."""
        if not self.has_turns:
            return {"prompt": conversation.text(question), "raw": True}
        messages = conversation.messages(question)
        return {"messages": messages, "template_args": self._arguments}

    def fit(
        self, conversation: Conversation, question: str, max_tokens: int | None, tell: Tell
    ) -> None:
        """Leave the oldest turns out where the context has no room for an answer, with a note.

        Args:
            max_tokens: of the answer; None is as many as there is room for.
        """
        context = self._engine.context
        if context is None or not conversation.sent:
            return
        room = context // _FOR_ANSWER
        room = room if max_tokens is None else min(room, max_tokens)
        if self._length(conversation, question) <= context - room:
            return
        before = conversation.left_out
        while conversation.sent and self._length(conversation, question) > context * _KEPT:
            conversation.left_out += 1
        count = conversation.left_out - before
        what = "turn is" if count == 1 else f"{count} turns are"
        tell(f"the context of {context:,} tokens is full: the oldest {what} left out from here on")

    def filled(self, tokens: int) -> Filled | None:
        """How full the context is with so many tokens; None where no length is known."""
        context = self._engine.context
        return None if context is None else Filled(tokens, context)

    def _length(self, conversation: Conversation, question: str) -> int:
        """The number of tokens of a prompt."""
        options = self.options(conversation, question)
        text = options.pop("prompt", None) or options.pop("messages")
        return len(encode_prompt(self._tokenizer, text, **options))
