"""The body of a request to OpenAI's `/v1/responses`, and the options that it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mlxspec.defaults import MAX_LOGPROBS
from mlxspec.metrics import Tell
from mlxspec.serve.core.refusal import Refusal
from mlxspec.serve.core.service import Service
from mlxspec.serve.openai.chat_body import ResponseFormat
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

LOGPROBS = "message.output_text.logprobs"  # what `include` may name
# What needs an answer that was kept, or is kept; nothing is kept here.
_STATEFUL = ("previous_response_id", "conversation", "prompt", "background")


class InputText(Fields):
    """A text."""

    type: Literal["input_text"]
    text: str


class OutputText(Fields):
    """A text of an earlier answer."""

    type: Literal["output_text"]
    text: str


class RefusalPart(Fields):
    """An earlier answer in which a model declined."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Part = Annotated[InputText | OutputText | RefusalPart, Field(discriminator="type")]
Content = str | list[Part]


class MessageItem(Fields):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    def add_to(self, turns: Turns) -> None:
        role = "system" if self.role == "developer" else self.role
        turns.text(role, _joined(self.content, "" if role == "assistant" else PARAGRAPH))


class CallItem(Fields):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def add_to(self, turns: Turns) -> None:
        turns.call(self.name, self.arguments, self.call_id)


class OutputItem(Fields):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content

    def add_to(self, turns: Turns) -> None:
        turns.result(self.call_id, _joined(self.output, PARAGRAPH))


class Thought(Fields):
    """A part of a reasoning."""

    text: str


class ReasoningItem(Fields):
    """What the model thought in an earlier answer; a part that is encrypted cannot be read."""

    type: Literal["reasoning"]
    summary: list[Thought] = Field(default_factory=list)
    content: list[Thought] | None = None

    def add_to(self, turns: Turns) -> None:
        for thought in self.content or self.summary:
            turns.reasoning(thought.text)


def _type_of(item: Any) -> str | None:
    """The type of an item, which one of a message may leave out."""
    if isinstance(item, dict):
        return str(item.get("type", "message"))
    return getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type_of),
]


class Tool(Fields):
    """A tool: a function of the client's, or one that runs at OpenAI or is offered otherwise."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Reasoning(Fields):
    """How much the model is to reason."""

    effort: Effort | None = None
    summary: str | None = None


class Text(Fields):
    """How the text of the answer is to look."""

    format: ResponseFormat | None = None


class Body(SamplingFields):
    """The body of a request."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool = False
    reasoning: Reasoning | None = None
    text: Text | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None

    @property
    def functions(self) -> list[Tool]:
        """The tools that a model can call: functions of the client."""
        return [one for one in self.tools or () if one.type == "function"]

    @property
    def logprobs(self) -> int | None:
        """The likeliest tokens to tell beside each token of a text; None tells nothing."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    @property
    def calls_in_parallel(self) -> bool:
        """Whether an answer may have several calls."""
        return self.parallel_tool_calls is not False

    def all_options(self, service: Service, tell: Tell) -> dict[str, Any]:
        """The options of `Engine.request`.

        Args:
            tell: called with what a person should know of how the prompt was made.

        Raises:
            Refusal: something is asked for that this server does not do.
        """
        self._require_stateless()
        options = self.options(service) | {"messages": self._turns()}
        if tools := self._tools(tell):
            options |= {"tools": tools, "parallel_calls": self.calls_in_parallel}
        if self.max_output_tokens is not None:
            options["max_tokens"] = self.max_output_tokens
        options["logprobs"] = self.logprobs
        if self.top_logprobs and self.logprobs is None:
            tell(f"top_logprobs says nothing unless include names {LOGPROBS}")
        effort = self.reasoning.effort if self.reasoning is not None else None
        return options | template_options(service, tell, effort=effort)

    def _require_stateless(self) -> None:
        for name in _STATEFUL:
            if getattr(self, name):
                why = f"{name} needs an answer that was kept, and this server keeps none"
                raise _refused(name, f"{why}: send the whole conversation as input.")
        if self.store:
            raise _refused("store", "store is true, and this server keeps no answer: give false.")

    def _turns(self) -> list[dict[str, Any]]:
        turns = Turns()
        if self.instructions:
            turns.text("system", self.instructions)
        if isinstance(self.input, str):
            turns.text("user", self.input)
        else:
            for item in self.input:
                item.add_to(turns)
        return turns.messages

    def _tools(self, tell: Tell) -> list[dict[str, Any]]:
        for at, one in enumerate(self.tools or ()):
            if one.type == "function" and not one.name:
                raise _refused(f"tools.{at}.name", f"tools.{at}.name: a function needs a name.")
        others = {one.type: None for one in self.tools or () if one.type != "function"}
        for kind in others:
            tell(f"tools of type {kind} are left out: the model is offered functions alone")
        if any(one.strict for one in self.functions):
            tell("strict is not kept: nothing holds the arguments of a call to their schema")
        if not may_call(self.tool_choice):
            return []
        return [tool(one.name or "", one.description, one.parameters) for one in self.functions]


def _joined(content: Content, between: str) -> str:
    return content if isinstance(content, str) else between.join(part.text for part in content)


def _refused(param: str, why: str) -> Refusal:
    return Refusal(400, why, param=param)
