"""`/generate`: a prompt in, a text and the figures of its speculation out."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from starlette.requests import Request as Http

from mlxspec.defaults import DEFAULT_MAX_TOKENS
from mlxspec.metrics import Generation, SpeculationStats
from mlxspec.serve.core.service import Asked
from mlxspec.serve.protocol.answering import answer_whole
from mlxspec.serve.protocol.answers import Decided
from mlxspec.serve.protocol.fields import DraftTokens, MaxTokens, SamplingFields
from mlxspec.serve.protocol.routing import route_of

router = APIRouter(tags=["mlxspec"])


class Prompt(SamplingFields):
    """The body of a request."""

    prompt: str
    max_tokens: MaxTokens | None = None
    use_speculative: bool = True
    draft_tokens: DraftTokens | None = None

    def all_options(self, service: Asked) -> dict[str, Any]:
        """The options of `Engine.request`."""
        most = service.settings.max_tokens or DEFAULT_MAX_TOKENS
        options = self.options(service) | {"prompt": self.prompt}
        options["max_tokens"] = self.max_tokens or min(most, DEFAULT_MAX_TOKENS)
        if self.draft_tokens is not None:
            options["draft_tokens"] = self.draft_tokens
        if not self.use_speculative:
            options["draft_tokens"] = 0
        return options


@router.post("/generate")
async def generate(body: Prompt, service: Asked, http: Http) -> Response:
    """Write an answer to a prompt; without a chat template, write on from it."""
    notes: list[str] = []
    options = body.all_options(service)
    route = route_of(service, body.routing, options, notes.append)
    request = await service.request(notes, **options)
    form = partial(_answer, service)
    return await answer_whole(service, http, [request], form, route)


def _answer(service: Asked, generations: list[Generation]) -> dict[str, Any]:
    """The text and its figures.

    Rates are null where nothing was proposed, and so are times that were not measured. The speedup
    compares with plain rounds of one text alone.
    """
    (generation,) = generations
    stats, decode_s = generation.speculation, generation.timing.decode_s
    count, measured, plain_s = _usual_count(stats), service.worker.measured, service.watch.plain_s()
    halves = measured.halves.get(count) if measured is not None else None
    speedup = None
    if plain_s and decode_s and stats.rounds:  # another host's answer has no rounds
        speedup = len(generation.tokens) * plain_s / decode_s
    metrics = {
        "acceptance_rate": stats.acceptance_rate,
        "speedup": speedup,
        "K": count,
        "tokens_per_round": stats.tokens_per_round,
        "draft_s": halves.draft_s if halves is not None else None,
        "verify_s": halves.verify_s if halves is not None else None,
    }
    decision = generation.decision if isinstance(generation, Decided) else {}
    return {"text": generation.text, "metrics": metrics, **decision}


def _usual_count(stats: SpeculationStats) -> int:
    """K; where it is chosen round by round, the one of most rounds."""
    if not stats.auto:
        return stats.draft_tokens
    ends = [*(visit.round for visit in stats.history[1:]), stats.rounds]
    rounds = Counter[int]()
    for visit, end in zip(stats.history, ends, strict=True):
        rounds[visit.draft_tokens] += end - visit.round
    return max(rounds, key=lambda count: rounds[count], default=0)
