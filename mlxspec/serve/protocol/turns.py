"""A conversation as `Engine.request` takes it, from protocols that cut it in other ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARAGRAPH = "\n\n"


class Turns:
    """Turns in their order.

    Texts of one side that follow each other are one turn, as most chat templates want it. For the
    same reason a system's text that comes later than all others is a user's.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def text(self, role: str, text: str) -> None:
        """What a system, a user or the assistant says."""
        if role == "system" and any(turn["role"] != "system" for turn in self.messages):
            role = "user"
        turn = self._turn(role)
        turn["content"] += PARAGRAPH + text if turn["content"] and role != "assistant" else text

    def reasoning(self, text: str) -> None:
        """What the assistant thinks."""
        turn = self._turn("assistant")
        before = turn.get("reasoning_content")
        turn["reasoning_content"] = before + PARAGRAPH + text if before else text

    def call(self, name: str, arguments: str | Mapping[str, Any], identity: str) -> None:
        """A call of a tool by the assistant."""
        function = {"name": name, "arguments": arguments}
        calls = self._turn("assistant").setdefault("tool_calls", [])
        calls.append({"id": identity, "type": "function", "function": function})

    def result(self, call: str, text: str) -> None:
        """The result of the call with this id."""
        self.messages.append({"role": "tool", "tool_call_id": call, "content": text})

    def _turn(self, role: str) -> dict[str, Any]:
        """The last turn, if it is of that side; else a new one."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": ""})
        return self.messages[-1]


def tool(
    name: str, description: str | None, parameters: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A tool as OpenAI's chats have it, with nothing but what a chat template reads."""
    function: dict[str, Any] = {"name": name}
    if description is not None:
        function["description"] = description
    return {"type": "function", "function": function | {"parameters": dict(parameters or {})}}
