"""OpenAI's `/v1/completions`: text goes on where a prompt ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import Field
from starlette.requests import Request as Http

from mlxspec.defaults import MAX_LOGPROBS
from mlxspec.metrics import Event, Generation, Logprob
from mlxspec.serve.core.refusal import Refusal, openai_error
from mlxspec.serve.core.service import Asked, Service
from mlxspec.serve.openai.infill import infill_of
from mlxspec.serve.protocol.answering import answer, choices
from mlxspec.serve.protocol.answers import name_of, now, timings, usage
from mlxspec.serve.protocol.fields import OpenAIFields, Token
from mlxspec.serve.protocol.listening import DONE, sse
from mlxspec.serve.protocol.routing import route_of
from mlxspec.spelling import Spelling

router = APIRouter(tags=["OpenAI"])

Prompt = str | Annotated[list[Token], Field(min_length=1)]


class Completion(OpenAIFields):
    """The body of a request."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[Any]:
        """One prompt, or several, as a list."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]

    def all_options(self, service: Service) -> tuple[list[Any], dict[str, Any]]:
        """The prompts, and the options of `Engine.request` for each.

        Raises:
            Refusal: something is asked for that the model does not do.
        """
        options = self.options(service) | {"raw": True, "stop": self.stop or ()}
        options["logprobs"] = self.logprobs
        if self.max_tokens is not None:
            options["max_tokens"] = self.max_tokens
        if not self.suffix:
            return self.prompts, options
        if not all(isinstance(prompt, str) for prompt in self.prompts):
            raise Refusal(400, "suffix: a prompt of token ids has none.", param="suffix")
        infill = infill_of(service.engine.tokenizer)
        prompts = [infill.prompt(prompt, self.suffix) for prompt in self.prompts]
        return prompts, options | {"eos": infill.ends}


@router.post("/v1/completions")
async def complete(body: Completion, service: Asked, http: Http) -> Response:
    """Write on from a prompt, without a chat template; token ids are taken as they are.

    With a `suffix` the text is what stands between the prompt and that.
    """
    (prompts, options), most = body.all_options(service), service.settings.max_choices
    notes: list[str] = []
    assert route_of(service, body.routing, options, notes.append) is None, "a text that goes on"
    if body.n * len(prompts) > most:
        raise Refusal(400, f"This server writes {most} texts for one request at most.", param="n")
    requests = [
        one
        for prompt in prompts
        for one in choices(await service.request(notes, prompt=prompt, **options), body.n)
    ]
    spelling = service.spelling if body.logprobs is not None else None
    form = CompletionForm(service.settings.name, spelling, with_usage=body.with_usage)
    return await answer(service, http, requests, form, stream=body.stream, trace=body.traces)


class CompletionForm:
    """The form of a completion; its chunks are of the same kind as the whole."""

    def __init__(self, model: str, spelling: Spelling | None, *, with_usage: bool) -> None:
        self._with_usage = with_usage
        self._spelling = spelling
        self._lengths: dict[int, int] = {}  # characters of each text, behind which tokens stand
        self._base = {
            "id": name_of("cmpl-"),
            "object": "text_completion",
            "created": now(),
            "model": model,
        }

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        texts = [
            self._choice(index, one.text, one.logprobs, one.finish_reason)
            for index, one in enumerate(generations)
        ]
        counts = {"usage": usage(generations), "timings": timings(generations[0])}
        return self._base | {"choices": texts} | counts

    def begin(self) -> Iterator[bytes]:
        yield from ()

    def event(self, index: int, event: Event, generation: Generation) -> Iterator[bytes]:
        if event.text or event.logprobs or event.finish_reason:
            choice = self._choice(index, event.text, event.logprobs, event.finish_reason)
            beside = {"timings": timings(generation)} if event.finish_reason else {}
            yield sse(self._base | {"choices": [choice]} | beside)

    def end(self, generations: list[Generation]) -> Iterator[bytes]:
        if self._with_usage:
            counts = {"usage": usage(generations), "timings": timings(generations[0])}
            yield sse(self._base | {"choices": []} | counts)
        yield DONE

    def error(self, refusal: Refusal) -> bytes:
        return sse(openai_error(refusal))

    def _choice(
        self, index: int, text: str, logprobs: Sequence[Logprob], finish: str | None
    ) -> dict[str, Any]:
        told = self._logprobs(index, logprobs)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    def _logprobs(self, index: int, logprobs: Sequence[Logprob]) -> dict[str, Any] | None:
        """As this older protocol has them: lists, and the place of each token in the text."""
        if self._spelling is None:
            return None
        spelled = self._spelling.as_dicts(logprobs)
        at, offsets = self._lengths.get(index, 0), []
        for one in spelled:
            offsets.append(at)
            at += len(one["token"])
        self._lengths[index] = at
        return {
            "tokens": [one["token"] for one in spelled],
            "token_logprobs": [one["logprob"] for one in spelled],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in spelled
            ],
            "text_offset": offsets,
        }
