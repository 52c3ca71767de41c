"""OpenAI's `/v1/chat/completions`: the next turn of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from fastapi import APIRouter, Response
from starlette.requests import Request as Http

from mlxspec.conversations import ToolCall
from mlxspec.metrics import Event, Generation, Logprob
from mlxspec.serve.core.refusal import Refusal, openai_error
from mlxspec.serve.core.service import Asked
from mlxspec.serve.openai.chat_body import Chat
from mlxspec.serve.protocol.answering import answer, choices
from mlxspec.serve.protocol.answers import beside, name_of, now, usage
from mlxspec.serve.protocol.listening import DONE, sse
from mlxspec.serve.protocol.routing import route_of
from mlxspec.spelling import Spelling

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat(body: Chat, service: Asked, http: Http) -> Response:
    """Write the assistant's next turn."""
    most = service.settings.max_choices
    if body.n > most:
        raise Refusal(400, f"This server writes {most} texts for one request at most.", param="n")
    notes: list[str] = []
    options = body.all_options(service, notes.append)
    route = route_of(service, body.routing, options, notes.append, count=body.n)
    request = await service.request(notes, **options)
    form = ChatForm(service.settings.name, body, service.spelling)
    requests = list(choices(request, body.n))
    shape = {"stream": body.stream, "trace": body.traces}
    return await answer(service, http, requests, form, **shape, route=route)


class ChatForm:
    """The form of a chat's answer.

    Args:
        model: its name. body: of the request. spelling: of tokens, for log-probabilities.
    """

    def __init__(self, model: str, body: Chat, spelling: Spelling) -> None:
        self._body = body
        self._spelling = spelling
        self._base = {"id": name_of("chatcmpl-"), "created": now(), "model": model}
        self._calls = [count() for _ in range(body.n)]  # numbers for the calls of each text

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        texts = [
            {
                "index": index,
                "message": _message(one),
                "logprobs": self._logprobs(one.logprobs),
                "finish_reason": _finish_reason(one),
            }
            for index, one in enumerate(generations)
        ]
        named = self._base | {"object": "chat.completion"}
        return named | {"choices": texts} | self._counts(generations)

    def begin(self) -> Iterator[bytes]:
        for index in range(self._body.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def event(self, index: int, event: Event, generation: Generation) -> Iterator[bytes]:
        delta = _delta(event.text, event.reasoning)
        if event.tool_calls:
            numbered = zip(event.tool_calls, self._calls[index], strict=False)
            delta["tool_calls"] = [{"index": at} | call.as_dict() for call, at in numbered]
        if delta or event.logprobs:
            yield self._chunk(index, delta, logprobs=self._logprobs(event.logprobs))
        if event.finish_reason:
            finish = _finish_reason(generation)
            yield self._chunk(index, {}, finish, **beside(generation))

    def end(self, generations: list[Generation]) -> Iterator[bytes]:
        if self._body.with_usage:
            named = self._base | {"object": "chat.completion.chunk"}
            yield sse(named | {"choices": []} | self._counts(generations))
        yield DONE

    def error(self, refusal: Refusal) -> bytes:
        return sse(openai_error(refusal))

    def _counts(self, generations: list[Generation]) -> dict[str, Any]:
        counts = usage(generations, predicted=self._body.prediction is not None)
        return {"usage": counts, **beside(generations[0])}

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        places = {"content": ("text", "call"), "reasoning_content": ("reasoning",)}
        told = {
            name: self._spelling.as_dicts(one for one in logprobs if one.place in of)
            for name, of in places.items()
        }
        return told | {"refusal": None}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish: str | None = None,
        *,
        logprobs: dict[str, Any] | None = None,
        **others: Any,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        named = self._base | {"object": "chat.completion.chunk"}
        return sse(named | {"choices": [choice]} | others)


def _message(generation: Generation) -> dict[str, Any]:
    calls: list[ToolCall] = generation.tool_calls
    message = {"role": "assistant", "content": generation.text or (None if calls else "")}
    if generation.reasoning:
        message["reasoning_content"] = generation.reasoning
    return message | ({"tool_calls": [call.as_dict() for call in calls]} if calls else {})


def _delta(text: str, reasoning: str) -> dict[str, Any]:
    delta = {"reasoning_content": reasoning, "content": text}
    return {name: value for name, value in delta.items() if value}


def _finish_reason(generation: Generation) -> str:
    """Why a text ended; a client runs the tools that it calls before it goes on."""
    calls = generation.finish_reason == "stop" and generation.tool_calls
    return "tool_calls" if calls else generation.finish_reason
