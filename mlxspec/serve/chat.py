"""OpenAI's `/v1/chat/completions`: the next turn of a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import Field
from starlette.requests import Request as Http

from mlxspec.metrics import Event, Generation
from mlxspec.serve.answering import answer, choices
from mlxspec.serve.answers import name_of, now, timings, usage
from mlxspec.serve.fields import Fields, MaxTokens, SamplingFields, StreamOptions
from mlxspec.serve.listening import DONE, sse
from mlxspec.serve.refusal import Refusal, openai_error
from mlxspec.serve.service import Asked

router = APIRouter(tags=["OpenAI"])


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


class Chat(SamplingFields):
    """The body of a request."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    model: str | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prediction: Expected | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def all_options(self, service: Asked) -> dict[str, Any]:
        """The options of `Engine.request`."""
        options = self.options(service) | {"messages": self.messages, "stop": self.stop or ()}
        most = self.max_completion_tokens or self.max_tokens
        if most is not None:
            options["max_tokens"] = most
        if self.prediction is not None:
            options["prediction"] = self.prediction.text
        if self.chat_template_kwargs is not None:
            usual = service.settings.usual.get("template_args") or {}
            options["template_args"] = {**usual, **self.chat_template_kwargs}
        return options


@router.post("/v1/chat/completions")
async def chat(body: Chat, service: Asked, http: Http) -> Response:
    """Write the assistant's next turn."""
    most = service.settings.max_choices
    if body.n > most:
        raise Refusal(400, f"This server writes {most} texts for one request at most.", param="n")
    request = await service.request(**body.all_options(service))
    form = ChatForm(service.settings.name, body)
    requests = list(choices(request, body.n))
    return await answer(service, http, requests, form, stream=body.stream, trace=body.traces)


class ChatForm:
    """The form of a chat's answer."""

    def __init__(self, model: str, body: Chat) -> None:
        self._count = body.n
        self._predicted = body.prediction is not None
        self._with_usage = body.stream_options is not None and body.stream_options.include_usage
        self._base = {"id": name_of("chatcmpl-"), "created": now(), "model": model}

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        texts = [
            {
                "index": index,
                "message": _message(one),
                "logprobs": None,
                "finish_reason": one.finish_reason,
            }
            for index, one in enumerate(generations)
        ]
        named = self._base | {"object": "chat.completion"}
        return named | {"choices": texts} | self._counts(generations)

    def begin(self) -> Iterator[bytes]:
        for index in range(self._count):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def event(self, index: int, event: Event, generation: Generation) -> Iterator[bytes]:
        if event.reasoning:
            yield self._chunk(index, {"reasoning_content": event.reasoning})
        if event.text:
            yield self._chunk(index, {"content": event.text})
        if event.finish_reason:
            yield self._chunk(index, {}, event.finish_reason, timings=timings(generation))

    def end(self, generations: list[Generation]) -> Iterator[bytes]:
        if self._with_usage:
            named = self._base | {"object": "chat.completion.chunk"}
            yield sse(named | {"choices": []} | self._counts(generations))
        yield DONE

    def error(self, refusal: Refusal) -> bytes:
        return sse(openai_error(refusal))

    def _counts(self, generations: list[Generation]) -> dict[str, Any]:
        counts = usage(generations, predicted=self._predicted)
        return {"usage": counts, "timings": timings(generations[0])}

    def _chunk(
        self, index: int, delta: dict[str, Any], finish: str | None = None, **beside: Any
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        named = self._base | {"object": "chat.completion.chunk"}
        return sse(named | {"choices": [choice]} | beside)


def _message(generation: Generation) -> dict[str, Any]:
    message = {"role": "assistant", "content": generation.text}
    if generation.reasoning:
        message["reasoning_content"] = generation.reasoning
    return message
