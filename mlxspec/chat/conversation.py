"""What was said in a conversation, turn by turn. Knows no model and no terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxspec.conversations import Message, messages_of
from mlxspec.errors import PromptError


@dataclass(frozen=True)
class Turn:
    """A question and its answer, with the reasoning that led to it."""

    question: str
    answer: str
    reasoning: str = ""


@dataclass
class Conversation:
    """The turns so far, and the system message that stands before them.

    `left_out` is the number of turns, the oldest, that are kept but no longer sent.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    left_out: int = 0

    @property
    def last(self) -> Turn | None:
        return self.turns[-1] if self.turns else None

    @property
    def sent(self) -> list[Turn]:
        """The turns that are still sent."""
        return self.turns[self.left_out :]

    def add(self, turn: Turn) -> None:
        self.turns.append(turn)

    def undo(self) -> Turn | None:
        """Take the last turn back; None where there is none."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.left_out = min(self.left_out, len(self.turns))
        return turn

    def messages(self, question: str | None = None, *, all_of_it: bool = False) -> list[Message]:
        """The conversation as OpenAI's API writes it, without any reasoning.

        Args:
            question: of a turn that is still to be answered.
            all_of_it: also the turns that are no longer sent.
        """
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns if all_of_it else self.sent:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        if question is not None:
            messages.append({"role": "user", "content": question})
        return messages

    def text(self, question: str) -> str:
        """The conversation as one text that a model without turns goes on with."""
        parts = [] if self.system is None else [self.system]
        parts += [turn.question + turn.answer for turn in self.sent]
        return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts) + question


def conversation_of(given: Any) -> tuple[Conversation, str]:
    """A conversation from messages of OpenAI's API, and its last question if it has no answer.

    Raises:
        PromptError: they are none, or do not take turns.
    """
    messages = messages_of(given)
    system = None
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    conversation = Conversation(system)
    for at in range(0, len(messages) - 1, 2):
        question, answer = _turn(messages[at : at + 2])
        conversation.add(
            Turn(question["content"], answer["content"], answer.get("reasoning_content", ""))
        )
    if len(messages) % 2 == 0:
        return conversation, ""
    (last,) = _turn(messages[-1:])
    return conversation, last["content"]


def _turn(messages: Sequence[Message]) -> Sequence[Message]:
    roles = [one["role"] for one in messages]
    if roles != ["user", "assistant"][: len(roles)] or any("tool_calls" in one for one in messages):
        raise PromptError(
            "The messages do not take turns: a chat has a question of the user, then an answer of "
            "the assistant, and no tools.",
            hint="Leave the other messages out.",
        )
    return messages
