"""Conversations and tools as OpenAI's API writes them, checked before a chat template sees them.

A template is given turns of one form: contents are strings, arguments of calls are objects, and
nothing is in them but what templates read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlxspec.errors import PromptError

Message = dict[str, Any]
Tool = Mapping[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
_NEWER = {"developer": "system"}  # names that OpenAI's later models give to the same
DEEPEST = 100  # levels of a tool or of a call's arguments; what reads and writes them recurses
_TEXT = ("text", "input_text", "output_text")  # types of a part of a content
_REASONING = ("reasoning_content", "reasoning")  # how servers name it, the first that has some

_LOOK = 'A turn looks like {"role": "user", "content": "Hello"}.'
_TOOL = 'A tool looks like {"type": "function", "function": {"name": "…", "parameters": {…}}}.'


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its arguments are a JSON object as text, and `id` names the call."""

    name: str
    arguments: str
    id: str

    def as_dict(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def messages_of(given: Any) -> list[Message]:
    """The turns of a conversation in the form that templates take.

    Raises:
        PromptError: they are no turns of text.
    """
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise PromptError("The messages are no list of turns.", hint=f"Give a list. {_LOOK}")
    messages = [_message(one, f"Message {at}") for at, one in enumerate(given, 1)]
    names = {call["id"]: call["function"]["name"] for one in messages for call in _calls(one)}
    for message in messages:
        if message.get("tool_call_id") in names:  # some templates want to know whose result it is
            message.setdefault("name", names[message["tool_call_id"]])
    if not any(_calls(one) or text.strip() for one in messages for text in texts_of(one)):
        raise PromptError("The messages have no text.", hint="Give a text as `content` of a turn.")
    return messages


def begins_with_system(given: Any) -> bool:
    """Whether a conversation begins with a system message of its own.

    Raises:
        PromptError: see `messages_of`.
    """
    return given is not None and bool(messages_of(given)[0]["role"] == "system")


def tools_of(given: Any) -> tuple[Tool, ...]:
    """The tools that a model may call.

    Raises:
        PromptError: they are no functions with a name.
    """
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise PromptError("The tools are no list.", hint=f"Give a list. {_TOOL}")
    for at, tool in enumerate(given, 1):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise PromptError(f"Tool {at} is no function with a name.", hint=_TOOL)
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise PromptError(f"The parameters of tool {at} are no schema.", hint=_TOOL)
        _require_shallow(tool, f"Tool {at}")
        every_text(tool, partial(_unicode, what=f"Tool {at}"))
    return tuple(given)


def texts_of(message: Message) -> Iterator[str]:
    """The texts of a turn that a template has to keep: its content, and each call."""
    yield message["content"]
    for call in _calls(message):
        yield call["function"]["name"]
        yield from texts_in(call["function"]["arguments"])


def texts_in(value: Any) -> Iterator[str]:
    """The strings in a value of JSON, the names of its fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_in([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts_in(one)


def mapped(message: Message, change: Callable[[str], str]) -> Message:
    """The turn with every text changed, that of keys in arguments too."""
    result = dict(message)
    for name in ("content", "reasoning_content", "name", "tool_call_id"):
        if name in message:
            result[name] = change(message[name])
    if "tool_calls" in message:
        result["tool_calls"] = every_text(message["tool_calls"], change)
    return result


def is_deeper(value: Any, levels: int = DEEPEST) -> bool:
    """Whether a value of JSON is nested deeper than that."""
    inner = value.values() if isinstance(value, Mapping) else value
    inside = inner if isinstance(value, Mapping | list | tuple) else ()
    return levels < 0 or any(is_deeper(one, levels - 1) for one in inside)


def every_text(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with every string changed; the names of an object's own fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {every_text(key, change): every_text(one, change) for key, one in value.items()}
    return [every_text(one, change) for one in value] if isinstance(value, list | tuple) else value


def require_unicode(what: str, text: str) -> None:
    """Raise PromptError where a text has half of a character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise PromptError(
            f"{what} is not valid Unicode: {half} is half of a character, or a byte.",
            hint="Decode bytes as what they are, such as bytes.decode('latin1').",
        ) from error


def _require_shallow(value: Any, what: str) -> None:
    if is_deeper(value):
        raise PromptError(
            f"{what} has an object that is nested more than {DEEPEST} levels deep.",
            hint="Make it flatter: no chat template writes such objects.",
        )


def _message(given: Any, what: str) -> Message:
    role = given.get("role") if isinstance(given, Mapping) else None
    role = _NEWER.get(role, role) if isinstance(role, str) else None
    if role not in _ROLES:
        raise PromptError(
            f"{what} has no role that is known.",
            hint=f"Give one of {', '.join(_ROLES)}. {_LOOK}",
        )
    calls = [_call(one, what) for one in given.get("tool_calls") or ()]
    if calls and role != "assistant":
        raise PromptError(f"{what} calls tools as {role}.", hint="Only an assistant calls tools.")
    content = given.get("content")
    if content is None and role in ("assistant", "tool"):  # a call alone, a result of nothing
        content = ""
    message: Message = {"role": role, "content": _text(content, what)}
    reasoning = next((given[name] for name in _REASONING if given.get(name)), None)
    if role == "assistant" and reasoning is not None:
        message["reasoning_content"] = _text(reasoning, f"The reasoning of {_lower(what)}")
    for name in ("name", "tool_call_id"):
        if given.get(name) is not None:
            message[name] = _text(given[name], f"The {name} of {_lower(what)}")
    return message | ({"tool_calls": calls} if calls else {})


def _text(content: Any, what: str) -> str:
    """A content as one string."""
    if isinstance(content, str):
        return _unicode(content, what)
    if not isinstance(content, list | tuple):
        raise PromptError(f"{what} has no text.", hint=_LOOK)
    return "".join(_unicode(_part(one, what), what) for one in content)


def _part(part: Any, what: str) -> str:
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in _TEXT:
        raise PromptError(
            f"{what} has a part of type {kind!r}, and only text can be read.",
            hint="Leave that part out, or put it into words.",
        )
    if not isinstance(part.get("text"), str):
        raise PromptError(f"{what} has a part without a text.", hint=_LOOK)
    return str(part["text"])


def _call(given: Any, what: str) -> dict[str, Any]:
    """A call of a tool with its arguments as an object."""
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise PromptError(
            f"{what} has a tool call that names no function.",
            hint='A call looks like {"function": {"name": "…", "arguments": "{…}"}}.',
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(_unicode(arguments, what))
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise PromptError(
            f"{what} calls {function['name']} with arguments that are no JSON object.",
            hint='Give a string such as "{\\"city\\": \\"Paris\\"}".',
        )
    _require_shallow(arguments, what)
    every_text(arguments, partial(_unicode, what=what))
    called = {"name": _unicode(function["name"], what), "arguments": arguments}
    return {"id": str(given.get("id") or ""), "type": "function", "function": called}


def _calls(message: Message) -> list[dict[str, Any]]:
    return list(message.get("tool_calls", ()))


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip())


def _unicode(text: str, what: str) -> str:
    require_unicode(what, text)
    return text


def _lower(what: str) -> str:
    return what[:1].lower() + what[1:]
