"""Anthropic's `/v1/messages`: the next turn of a conversation, and the length of its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Response
from starlette.requests import Request as Http

from mlxspec.conversations import messages_of, tools_of
from mlxspec.metrics import Event, Generation, silent
from mlxspec.serve.anthropic.messages_body import Body, Conversation
from mlxspec.serve.core.refusal import Refusal, anthropic_error
from mlxspec.serve.core.service import Asked
from mlxspec.serve.protocol.answering import answer
from mlxspec.serve.protocol.answers import beside, name_of
from mlxspec.serve.protocol.listening import sse
from mlxspec.serve.protocol.parts import Change, Part, Parts, parts_of
from mlxspec.serve.protocol.routing import route_of
from mlxspec.text import encode_prompt

router = APIRouter(tags=["Anthropic"])

# Of a thought: clients send it back unless it is empty, and nobody here looks at it.
SIGNATURE = "unsigned"


@router.post("/v1/messages")
async def message(body: Body, service: Asked, http: Http) -> Response:
    """Write the assistant's next turn."""
    notes: list[str] = []
    options = body.all_options(service, notes.append)
    route = route_of(service, body.routing, options, notes.append)
    request = await service.request(notes, **options)
    form = MessageForm(service.settings.name, len(request.tokens), body.max_tokens)
    shape = {"stream": body.stream, "trace": body.traces}
    return await answer(service, http, [request], form, **shape, route=route)


@router.post("/v1/messages/count_tokens")
async def count(body: Conversation, service: Asked) -> dict[str, int]:
    """The tokens of a prompt, also of one that is longer than the context."""
    tokenizer = service.engine.tokenizer
    if tokenizer is None:
        raise Refusal(400, "The server has no tokenizer.")
    own = body.prompt_options(service, silent)

    def encoded() -> list[int]:
        options = service.with_usual(own)
        return encode_prompt(
            tokenizer,
            messages_of(options["messages"]),
            tools=tools_of(options.get("tools")),
            system=options.get("system"),
            template_args=options.get("template_args"),
        )

    return {"input_tokens": len(await service.aside(encoded))}


class MessageForm:
    """The form of a message.

    Args:
        prompt_tokens: of the request. max_tokens: that it asks for.
    """

    def __init__(self, model: str, prompt_tokens: int, max_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._parts = Parts()
        self._base = {
            "id": name_of("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        (one,) = generations
        blocks = [_block(part) for part in parts_of(one)]
        ended = self._end_of(one) | {"usage": usage(one)} | beside(one)
        return self._base | {"content": blocks} | ended

    def begin(self) -> Iterator[bytes]:
        counts = _counts(self._prompt_tokens, cached=0, written=0)
        not_yet = {"stop_reason": None, "stop_sequence": None}
        message = self._base | not_yet | {"content": [], "usage": counts}
        yield _told("message_start", message=message)
        yield _told("ping")

    def event(self, index: int, event: Event, generation: Generation) -> Iterator[bytes]:
        for change in self._parts.add(event):
            yield from _changed(change)

    def end(self, generations: list[Generation]) -> Iterator[bytes]:
        (one,) = generations
        counts = {"usage": usage(one)}
        yield _told("message_delta", delta=self._end_of(one), **counts, **beside(one))
        yield _told("message_stop")

    def error(self, refusal: Refusal) -> bytes:
        return sse(anthropic_error(refusal), "error")

    def _end_of(self, generation: Generation) -> dict[str, Any]:
        """Why a text ended."""
        if generation.finish_reason == "length":
            is_whole = len(generation.tokens) >= self._max_tokens
            reason = "max_tokens" if is_whole else "model_context_window_exceeded"
        elif generation.stopped_by is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if generation.tool_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": generation.stopped_by}


def usage(generation: Generation) -> dict[str, Any]:
    """Anthropic's counts of tokens: those that were read are not counted among the cached ones."""
    counts = _counts(
        generation.prompt_tokens,
        cached=generation.cached_prompt_tokens,
        written=len(generation.tokens),
    )
    return counts | {"output_tokens_details": {"thinking_tokens": generation.reasoning_tokens}}


def _counts(prompt: int, *, cached: int, written: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": written,
    }


def _block(part: Part, *, empty: bool = False) -> dict[str, Any]:
    """A block of the content.

    Args:
        empty: how it begins, in a stream.
    """
    text = "" if empty else part.text
    if part.kind == "text":
        return {"type": "text", "text": text}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": "" if empty else SIGNATURE}
    assert part.call is not None
    called = {"id": part.call.id, "name": part.call.name}
    return {"type": "tool_use"} | called | {"input": {} if empty else part.arguments}


_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _changed(change: Change) -> Iterator[bytes]:
    part = change.part
    if change.what == "begins":
        block = _block(part, empty=True)
        yield _told("content_block_start", index=part.index, content_block=block)
    elif change.what == "grows":
        kind, name = _DELTAS[part.kind]
        yield _delta(part, {"type": kind, name: change.text})
    else:
        if part.kind == "reasoning":
            yield _delta(part, {"type": "signature_delta", "signature": SIGNATURE})
        yield _told("content_block_stop", index=part.index)


def _delta(part: Part, delta: dict[str, Any]) -> bytes:
    return _told("content_block_delta", index=part.index, delta=delta)


def _told(kind: str, **fields: Any) -> bytes:
    """An event, which has its kind as its name too."""
    return sse({"type": kind} | fields, kind)
