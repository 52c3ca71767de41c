"""What answers say beside their text: usage, timings, and where the tokens come from."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from mlxspec.defaults import PREDICTION
from mlxspec.metrics import Generation


@dataclass
class Decided(Generation):
    """A text of which it was decided who gives it; `decision` has the fields of its answer."""

    decision: dict[str, Any] = field(default_factory=dict)


def name_of(beginning: str) -> str:
    """A name for one answer, such as `chatcmpl-8f0c…`."""
    return beginning + secrets.token_hex(12)


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def usage(generations: list[Generation], *, predicted: bool = False) -> dict[str, Any]:
    """OpenAI's counts of tokens over the choices of one request, whose prompt counts once.

    Args:
        predicted: whether the request had a prediction, of which OpenAI counts the tokens.
    """
    first = generations[0]
    written = sum(len(one.tokens) for one in generations)
    details = {"reasoning_tokens": sum(one.reasoning_tokens for one in generations)}
    if predicted:
        sources = [one.speculation.by_source.get(PREDICTION) for one in generations]
        accepted = sum(source.accepted for source in sources if source is not None)
        drafted = sum(source.drafted for source in sources if source is not None)
        details |= {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        }
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": first.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": first.cached_prompt_tokens},
        "completion_tokens_details": details,
    }


def beside(generation: Generation) -> dict[str, Any]:
    """What an answer says beside the fields of its protocol: timings, and who wrote it."""
    decision = generation.decision if isinstance(generation, Decided) else {}
    return {"timings": timings(generation), **decision}


def timings(generation: Generation) -> dict[str, Any]:
    """How long one text took, and what became of its proposals; names as llama.cpp has them.

    Milliseconds, and tokens per second. `draft_n` and `draft_n_accepted` are of full rounds.
    """
    timing, speculation = generation.timing, generation.speculation
    read = generation.prompt_tokens - generation.cached_prompt_tokens
    written = len(generation.tokens)
    return {
        "prompt_n": read,
        "prompt_ms": round(timing.prefill_s * 1e3, 3),
        "prompt_per_second": _per_second(read, timing.prefill_s),
        "predicted_n": written,
        "predicted_ms": round(timing.decode_s * 1e3, 3),
        "predicted_per_second": _per_second(written, timing.decode_s),
        "cache_n": generation.cached_prompt_tokens,
        "rounds": speculation.rounds,
        "draft_n": speculation.drafted,
        "draft_n_accepted": speculation.accepted,
        "drafted_by_position": list(speculation.drafted_by_position),
        "accepted_by_position": list(speculation.accepted_by_position),
        "by_source": {name: dict(vars(one)) for name, one in speculation.by_source.items()},
        "written_by": dict(generation.written_by),
        "seed": generation.seed,
        "notes": list(generation.notes),
    }


def _per_second(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds else None
