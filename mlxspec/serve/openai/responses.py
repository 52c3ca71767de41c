"""OpenAI's `/v1/responses`: the next items of a conversation, of which nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Response
from starlette.requests import Request as Http

from mlxspec.decode.request import Request
from mlxspec.metrics import Event, Generation, Logprob
from mlxspec.serve.core.refusal import Refusal
from mlxspec.serve.core.service import Asked
from mlxspec.serve.openai.responses_body import Body
from mlxspec.serve.protocol.answering import answer
from mlxspec.serve.protocol.answers import beside, name_of, now
from mlxspec.serve.protocol.listening import sse
from mlxspec.serve.protocol.parts import Change, Part, Parts, parts_of
from mlxspec.serve.protocol.routing import route_of
from mlxspec.spelling import Spelling

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses")
async def respond(body: Body, service: Asked, http: Http) -> Response:
    """Write the next items: reasoning, a message, calls of functions."""
    notes: list[str] = []
    options = body.all_options(service, notes.append)
    route = route_of(service, body.routing, options, notes.append)
    request = await service.request(notes, **options)
    form = ResponseForm(service.settings.name, body, request, service.spelling)
    shape = {"stream": body.stream, "trace": body.traces}
    return await answer(service, http, [request], form, **shape, route=route)


class ResponseForm:
    """The form of a response.

    Args:
        spelling: of tokens, for log-probabilities.
    """

    def __init__(self, model: str, body: Body, request: Request, spelling: Spelling) -> None:
        self._spelling = spelling
        self._parts = Parts()
        self._names: list[str] = []  # of the items, in their order
        self._count = 0  # of events
        self._base = {"id": name_of("resp_"), "object": "response", "created_at": now()}
        self._base |= {"model": model} | _asked(body, request)

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        (one,) = generations
        return self._ended(one, self._items(parts_of(one)))

    def begin(self) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._told(kind, response=self._response("in_progress", []))

    def event(self, index: int, event: Event, generation: Generation) -> Iterator[bytes]:
        for change in self._parts.add(event):
            yield from self._changed(change)

    def end(self, generations: list[Generation]) -> Iterator[bytes]:
        (one,) = generations
        response = self._ended(one, self._items(self._parts.all))
        yield self._told(f"response.{response['status']}", response=response)

    def error(self, refusal: Refusal) -> bytes:
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        self._parts.cut()
        response = self._response("failed", self._items(self._parts.all), error=error)
        return self._told("response.failed", response=response)

    # --- the response ---------------------------------------------------------------------------

    def _ended(self, generation: Generation, items: list[dict[str, Any]]) -> dict[str, Any]:
        is_cut = generation.finish_reason == "length"
        return self._response(
            "incomplete" if is_cut else "completed",
            items,
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            usage=usage(generation),
            **beside(generation),
        )

    def _response(self, status: str, items: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
        usual = {"error": None, "incomplete_details": None, "usage": None}
        return self._base | usual | {"status": status, "output": items} | others

    def _items(self, parts: list[Part]) -> list[dict[str, Any]]:
        return [self._item(part) for part in parts]

    def _item(self, part: Part, *, begins: bool = False) -> dict[str, Any]:
        """A part as an item, which has no text where it only begins."""
        status = "incomplete" if part.is_cut else "completed"
        item = {"id": self._name(part), "status": "in_progress" if begins else status}
        if part.call is not None:
            called = {"call_id": part.call.id, "name": part.call.name}
            arguments = "" if begins else part.text
            return item | {"type": "function_call"} | called | {"arguments": arguments}
        contents = [] if begins else [self._content(part)]
        if part.kind == "reasoning":
            return item | {"type": "reasoning", "summary": [], "content": contents}
        return item | {"type": "message", "role": "assistant", "content": contents}

    def _name(self, part: Part) -> str:
        if part.index == len(self._names):
            kinds = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}
            self._names.append(name_of(kinds[part.kind]))
        return self._names[part.index]

    def _content(self, part: Part) -> dict[str, Any]:
        if part.kind == "reasoning":
            return {"type": "reasoning_text", "text": part.text}
        told = self._logprobs(part, part.logprobs)
        return {"type": "output_text", "text": part.text, "annotations": []} | told

    def _logprobs(self, part: Part, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        """The field of a text that clients look for, also where it is empty."""
        return {"logprobs": self._spelling.as_dicts(logprobs)} if part.kind == "text" else {}

    # --- events ---------------------------------------------------------------------------------

    def _changed(self, change: Change) -> Iterator[bytes]:
        part = change.part
        at = {"item_id": self._name(part), "output_index": part.index}
        if part.kind != "call":
            at["content_index"] = 0
        if change.what == "begins":
            item = self._item(part, begins=True)
            yield self._told("response.output_item.added", output_index=part.index, item=item)
            if part.kind != "call":
                empty = self._content(Part(part.index, part.kind))
                yield self._told("response.content_part.added", **at, part=empty)
        elif change.what == "grows":
            told = self._logprobs(part, change.logprobs)
            yield self._told(f"{_KINDS[part.kind]}.delta", **at, delta=change.text, **told)
        else:
            yield from self._over(part, at)

    def _over(self, part: Part, at: dict[str, Any]) -> Iterator[bytes]:
        if part.call is not None:
            whole = {"name": part.call.name, "arguments": part.text}
            yield self._told(f"{_KINDS[part.kind]}.done", **at, **whole)
        else:
            told = self._logprobs(part, part.logprobs)
            yield self._told(f"{_KINDS[part.kind]}.done", **at, text=part.text, **told)
            yield self._told("response.content_part.done", **at, part=self._content(part))
        done = self._item(part)
        yield self._told("response.output_item.done", output_index=part.index, item=done)

    def _told(self, kind: str, **fields: Any) -> bytes:
        """An event, which has its kind as its name too."""
        self._count += 1
        return sse({"type": kind, "sequence_number": self._count - 1} | fields, kind)


_KINDS = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}


def usage(generation: Generation) -> dict[str, Any]:
    """OpenAI's counts of tokens, by the names that they have here."""
    written = len(generation.tokens)
    return {
        "input_tokens": generation.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": generation.cached_prompt_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": generation.reasoning_tokens},
        "total_tokens": generation.prompt_tokens + written,
    }


def _asked(body: Body, request: Request) -> dict[str, Any]:
    """What a response says of its request."""
    reasoning = body.reasoning
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.calls_in_parallel,
        "previous_response_id": None,
        "background": False,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "store": False,
        "temperature": request.sampling.temperature,
        "text": {"format": {"type": "text"}},
        "top_logprobs": body.logprobs or 0,
        "tool_choice": body.tool_choice or "auto",
        "tools": [
            {"parameters": {}, "strict": False} | one.model_dump(exclude_none=True)
            for one in body.functions
        ],
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
    }
