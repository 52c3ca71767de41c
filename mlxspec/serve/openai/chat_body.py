"""The body of a request to `/v1/chat/completions`, and the options that it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mlxspec.defaults import MAX_LOGPROBS
from mlxspec.metrics import Tell
from mlxspec.serve.core.refusal import Refusal
from mlxspec.serve.core.service import Service
from mlxspec.serve.protocol.fields import (
    Effort,
    Fields,
    JsonObject,
    MaxTokens,
    OpenAIFields,
    may_call,
)
from mlxspec.serve.protocol.thinking import template_options


class ResponseFormat(Fields):
    """Text, and nothing else: output cannot be constrained."""

    type: Literal["text"]


class TextPart(Fields):
    """A part of a text."""

    type: Literal["text"]
    text: str


class Expected(Fields):
    """A text that the answer is expected to repeat, at least in parts."""

    type: Literal["content"] = "content"
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Chat(OpenAIFields):
    """The body of a request."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    prediction: Expected | None = None
    response_format: ResponseFormat | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: JsonObject | None = None

    def all_options(self, service: Service, tell: Tell) -> dict[str, Any]:
        """The options of `Engine.request`.

        Args:
            tell: called with what a person should know of how the prompt was made.

        Raises:
            Refusal: something is asked for that no local model does.
        """
        options = self.options(service) | {"messages": self.messages, "stop": self.stop or ()}
        most = self.max_completion_tokens or self.max_tokens
        if most is not None:
            options["max_tokens"] = most
        if self.prediction is not None:
            options["prediction"] = self.prediction.text
        if tools := self._tools():
            options |= {"tools": tools, "parallel_calls": self.parallel_tool_calls is not False}
        options["logprobs"] = self._logprobs()
        given = self.chat_template_kwargs or {}
        return options | template_options(service, tell, given, effort=self.reasoning_effort)

    def _tools(self) -> list[dict[str, Any]]:
        return self.tools or [] if may_call(self.tool_choice) else []

    def _logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise Refusal(
                400, "top_logprobs says nothing without logprobs: true.", param="top_logprobs"
            )
        return (self.top_logprobs or 0) if self.logprobs else None
