"""The body of a request to Anthropic's `/v1/messages`, and the options that it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mlxspec.metrics import Tell
from mlxspec.serve.core.refusal import Refusal
from mlxspec.serve.core.service import Service
from mlxspec.serve.protocol.fields import (
    Effort,
    Fields,
    JsonObject,
    MaxTokens,
    SamplingFields,
    may_call,
)
from mlxspec.serve.protocol.thinking import template_options
from mlxspec.serve.protocol.turns import PARAGRAPH, Turns, tool

# Claude Code begins its system text with a line that differs from request to request: read as a
# part of the prompt, it would keep every turn from using what was read for the last one.
_ATTRIBUTION = "x-anthropic-billing-header:"


class TextBlock(Fields):
    """A text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Fields):
    """What the model thought in an earlier turn."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Fields):
    """Thoughts of another model that only its servers can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Fields):
    """A call of a tool in an earlier turn."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: JsonObject


class ToolResultBlock(Fields):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False

    @property
    def text(self) -> str:
        text = PARAGRAPH.join(_texts(self.content))
        return f"Error: {text}" if self.is_error and not text.startswith("Error") else text


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


class Message(Fields):
    """A turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def add_to(self, turns: Turns) -> None:
        content = self.content
        blocks = [TextBlock(type="text", text=content)] if isinstance(content, str) else content
        for block in blocks:
            _add(turns, self.role, block)


class Tool(Fields):
    """A tool that the client runs."""

    name: Annotated[str, Field(min_length=1)]
    type: str | None = None
    description: str | None = None
    input_schema: JsonObject | None = None
    strict: bool | None = None


class ToolChoice(Fields):
    """Whether the model may call tools, and whether several in one answer."""

    type: Literal["auto", "none", "any", "tool"]
    disable_parallel_tool_use: bool = False


class Thinking(Fields):
    """Whether the model is to reason, and how much."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: MaxTokens | None = None

    @property
    def is_on(self) -> bool | None:
        return {"enabled": True, "disabled": False}.get(self.type)


class OutputConfig(Fields):
    """How the model is to answer: text cannot be constrained."""

    effort: Effort | None = None
    format: dict[str, Any] | None = None


class Conversation(Fields):
    """What makes the prompt of a request."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def prompt_options(self, service: Service, tell: Tell) -> dict[str, Any]:
        """The options of `Engine.encode`.

        Args:
            tell: called with what a person should know of how the prompt was made.

        Raises:
            Refusal: something is asked for that no local model does.
        """
        options: dict[str, Any] = {"messages": self._turns()}
        tools = self._tools(tell)
        if tools:
            choice = self.tool_choice
            several = choice is None or not choice.disable_parallel_tool_use
            options |= {"tools": tools, "parallel_calls": several}
        thinking, config = self.thinking or Thinking(type="adaptive"), self.output_config
        if config is not None and config.format is not None:
            raise _refused("output_config.format", "the form of an answer cannot be constrained")
        return options | template_options(
            service,
            tell,
            on=thinking.is_on,
            effort=config.effort if config is not None else None,
            budget=thinking.budget_tokens,
        )

    def _turns(self) -> list[dict[str, Any]]:
        turns = Turns()
        system = _texts(self.system or "")
        for text in system:
            if text and not text.startswith(_ATTRIBUTION):
                turns.text("system", text)
        for message in self.messages:
            message.add_to(turns)
        return turns.messages

    def _tools(self, tell: Tell) -> list[dict[str, Any]]:
        tools = self.tools or []
        for at, one in enumerate(tools):
            if one.input_schema is None or one.type not in (None, "custom"):
                why = f"{one.type or one.name} is no tool of the client's with an input_schema"
                raise _refused(f"tools.{at}", f"{why}: leave it out")
        if any(one.strict for one in tools):
            tell("strict is not kept: nothing holds the input of a call to its schema")
        if not may_call(self.tool_choice.type if self.tool_choice is not None else None):
            return []
        return [tool(one.name, one.description, one.input_schema) for one in tools]


class Body(Conversation, SamplingFields):
    """The body of a request for an answer."""

    max_tokens: MaxTokens
    stop_sequences: list[str] | None = None
    stream: bool = False

    def all_options(self, service: Service, tell: Tell) -> dict[str, Any]:
        """The options of `Engine.request`, with the arguments of `prompt_options`."""
        options = self.options(service) | self.prompt_options(service, tell)
        return options | {"max_tokens": self.max_tokens, "stop": self.stop_sequences or ()}


def _add(turns: Turns, role: str, block: Any) -> None:
    match block:
        case TextBlock():
            turns.text(role, block.text)
        case ThinkingBlock() if role == "assistant":
            turns.reasoning(block.thinking)
        case ToolUseBlock() if role == "assistant":
            turns.call(block.name, block.input, block.id)
        case ToolResultBlock() if role == "user":
            turns.result(block.tool_use_id, block.text)
        case RedactedBlock():
            pass
        case _:
            raise _refused("messages", f"a turn of the {role} has no block of type {block.type}")


def _texts(content: str | list[TextBlock]) -> list[str]:
    return [content] if isinstance(content, str) else [block.text for block in content]


def _refused(param: str, why: str) -> Refusal:
    return Refusal(400, f"{param}: {why}.", param=param)
