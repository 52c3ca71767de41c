"""The turns of one prompt, the forms in which templates take them, and what a template keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import count
from typing import Any

from mlxspec.conversations import Message, Tool, texts_of

THE_TOOLS = "the tools"
ID_LETTERS = 9  # of the id of a call, where a template counts them

# Names under which templates read a turn's reasoning.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_THOUGHT = "</think>"  # templates drop what stands before it in an earlier answer
_KEY = "mlxspec0key0probe"


@dataclass(frozen=True)
class Form:
    """How a template may want its turns.

    Args:
        parts: the roles whose contents are lists of one part.
        strings: whether the arguments of calls are strings of JSON.
        reasons: whether turns have their reasoning.
        short_ids: whether calls are named in nine letters, as Mistral's templates want it.
    """

    parts: frozenset[str] = frozenset()
    strings: bool = False
    reasons: bool = True
    short_ids: bool = False

    def shaped(self, message: Message) -> Message:
        shaped = dict(message)
        if message["role"] in self.parts:
            shaped["content"] = [{"type": "text", "text": message["content"]}]
        reasoning = shaped.pop("reasoning_content", None)
        if reasoning is not None and self.reasons:
            shaped |= dict.fromkeys(_REASONING, reasoning)
        if self.strings and "tool_calls" in message:
            shaped["tool_calls"] = [_changed(call, json_of) for call in message["tool_calls"]]
        if self.short_ids:
            calls = [{**call, "id": _short(call["id"])} for call in shaped.get("tool_calls", ())]
            shaped |= {"tool_calls": calls} if calls else {}
            shaped |= {"tool_call_id": _short(shaped.get("tool_call_id", ""))}
        return shaped

    def is_printed(self, rendered: str) -> bool:
        """Whether a template of strings has printed a list of parts, or arguments, as Python."""
        return (bool(self.parts) and "'type': 'text'" in rendered) or f"'{_KEY}': " in rendered


@dataclass(frozen=True)
class Chat:
    """The turns and the tools of one prompt."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()

    @property
    def has_system(self) -> bool:
        return bool(self.messages[0]["role"] == "system")

    @property
    def goes_on(self) -> bool:
        """Whether the last turn is an answer to be gone on with."""
        return bool(self.messages[-1]["role"] == "assistant")

    @property
    def is_single(self) -> bool:
        """Whether it is one turn of a user, with or without a system message."""
        return self._roles in (["user"], ["system", "user"])

    @property
    def name(self) -> str:
        return "the prompt" if self.is_single else "the messages"

    def forms(self) -> Iterator[Form]:
        """As strings and objects, which most templates take, and then otherwise."""
        roles = frozenset(self._roles)
        parts = [frozenset[str](), roles]
        if self.has_system and len(roles) > 1:
            parts += [frozenset({"system"}), roles - {"system"}]
        for reasons in (True, False) if self.have("reasoning_content") else (True,):
            for strings in (False, True) if self.have("tool_calls") else (False,):
                yield from (Form(some, strings, reasons) for some in parts)
        if self.have("tool_calls") or self.have("tool_call_id"):
            yield Form(short_ids=True)

    def folded(self) -> Chat | None:
        """The system's text at the start of the user's, where one follows the other."""
        if self._roles[:2] != ["system", "user"]:
            return None
        system, user, *others = self.messages
        text = f"{system['content']}\n\n{user['content']}"
        return replace(self, messages=[user | {"content": text}, *others])

    def probed(self) -> Chat:
        """The same with texts that nothing else contains."""
        numbers = count()

        def probe(*_: Any) -> str:
            return f"mlxspec0{next(numbers)}0probe"

        messages = []
        for message in self.messages:
            texts = [name for name in ("content", "reasoning_content") if message.get(name)]
            changed = {name: probe() for name in texts}
            calls = [
                _changed(one, lambda _: {_KEY: probe()}) for one in message.get("tool_calls", ())
            ]
            messages.append(message | changed | ({"tool_calls": calls} if calls else {}))
        tools = [{**one, "function": {**one["function"], "name": probe()}} for one in self.tools]
        return Chat(messages, tools)

    def missing_in(self, rendered: str, *, lenient: bool = False) -> str:
        """Which of the texts is not in it; empty where all are.

        Args:
            lenient: do without the calls of earlier turns, which some templates never write.
        """
        kept = _Kept(rendered)
        for at, message in enumerate(self.messages):
            text, *called = texts_of(message)
            # Text beside a call is not every template's to keep.
            needed = called or [text.rpartition(_THOUGHT)[2] or text]
            if not (lenient and called) and not all(one in kept for one in needed):
                return self._name_of(at)
        return "" if all(one["function"]["name"] in kept for one in self.tools) else THE_TOOLS

    def lost_in(self, rendered: str) -> Iterator[str]:
        """What is not in it of turns that call tools, in words."""
        kept = _Kept(rendered)
        for at, message in enumerate(self.messages):
            text, *called = texts_of(message)
            if not all(one in kept for one in called):
                yield f"the tool calls of {self._name_of(at)}"
            if called and text not in kept:
                yield f"the text beside the tool calls of {self._name_of(at)}"

    @property
    def _roles(self) -> list[str]:
        return [message["role"] for message in self.messages]

    def have(self, name: str) -> bool:
        """Whether a turn has a field of that name."""
        return any(name in message for message in self.messages)

    def _name_of(self, at: int) -> str:
        role = self._roles[at]
        if at == 0 and role == "system":
            return "the system message"
        return "the prompt" if self.is_single else f"message {at + 1}, of the {role}"


class _Kept:
    """The texts that a template has kept: but for blanks, or as strings of JSON."""

    def __init__(self, rendered: str) -> None:
        self._rendered = rendered

    def __contains__(self, text: str) -> bool:
        if text in self._rendered:
            return True
        return any(
            " ".join(one.split()) in self._on_one_line for one in (text, json_of(text)[1:-1])
        )

    @cached_property
    def _on_one_line(self) -> str:
        return " ".join(self._rendered.split())


def json_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(name: str) -> str:
    """An id of nine letters and digits, the same for the same id."""
    is_short = len(name) == ID_LETTERS and name.isascii() and name.isalnum()
    return name if is_short else sha256(name.encode()).hexdigest()[:ID_LETTERS]


def _changed(call: dict[str, Any], change: Any) -> dict[str, Any]:
    """A call with its arguments changed."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": change(function["arguments"])}}
