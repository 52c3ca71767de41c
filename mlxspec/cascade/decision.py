"""The decision on one question: whose answer is used, why, and what that cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mlxspec.cascade.client import Fault, Reply
from mlxspec.cascade.rules import Draft, Finding, Thresholds
from mlxspec.cascade.upstreams import Upstream
from mlxspec.metrics import Generation

Author = Literal["local", "upstream"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whose answer is used, and why.

    Args:
        model_used: the name of the model that wrote the text.
        upstream: the name of the one that was, or would have been, asked.
        draft_tokens: of the local answer, those that the rules judged.
        verified_tokens: those that were compared with the upstream's answer; 0 without one.
        accepted: whether the local answer is used. spilled_over: whether the upstream was asked.
        rules: the names of those that asked for it.
        similarity: of both answers, 0 to 1. reason: why, in words.
        cost: of the upstream's answer; saved: what one as long as the local answer would have cost.
            In the currency of its prices; None where that is not known.
        spent_tokens: that the upstream read and wrote; saved_tokens: those that it would have.
        latency_s: seconds from the question to the whole answer.
    """

    text: str
    finish_reason: str
    author: Author
    model_used: str
    upstream: str
    draft_tokens: int
    verified_tokens: int = 0
    accepted: bool = True
    spilled_over: bool = False
    rules: tuple[str, ...] = ()
    similarity: float | None = None
    reason: str
    cost: float | None = 0.0
    saved: float | None = 0.0
    spent_tokens: int | None = 0
    saved_tokens: int = 0
    latency_s: float

    @property
    def failed(self) -> bool:
        """Whether the upstream was asked and gave no answer."""
        return self.spilled_over and self.author == "local" and self.similarity is None

    def as_dict(self) -> dict[str, Any]:
        """The fields of a result: a choice between whole answers is not exact."""
        values = asdict(self)
        answer = {name: values.pop(name) for name in ("text", "finish_reason", "model_used")}
        del values["author"]
        values["rules"] = list(self.rules)
        values["latency_s"] = round(self.latency_s, 6)
        if self.similarity is not None:
            values["similarity"] = round(self.similarity, 4)
        return answer | {"speculative_decoding": values | {"exact": False}}

    def as_counted(self) -> dict[str, Any]:
        """What a log may have of it: no words of a prompt or an answer."""
        return {
            "upstream": self.upstream,
            "spilled_over": self.spilled_over,
            "used": self.author,
            "rules": list(self.rules),
            "similarity": None if self.similarity is None else round(self.similarity, 4),
            "cost": self.cost,
        }

    def line(self) -> str:
        """What was decided, for people."""
        whose = "the local answer" if self.accepted else f"the answer of {self.upstream}"
        cost = f"; it cost {self.cost:.6f}" if self.spilled_over and self.cost else ""
        return f"not exact: {whose} is used, because {self.reason}{cost}"


def stayed(
    draft: Draft, generation: Generation, upstream: Upstream, model: str, latency_s: float
) -> Decision:
    """The decision where no rule asks for the upstream."""
    count = len(generation.tokens)
    return Decision(
        text=generation.text,
        finish_reason=generation.finish_reason,
        author="local",
        model_used=model,
        upstream=upstream.name,
        draft_tokens=draft.tokens,
        reason=f"no rule asks for {upstream.name} after {draft.tokens} tokens; nothing was sent",
        saved=upstream.cost(generation.prompt_tokens, count),
        saved_tokens=generation.prompt_tokens + count,
        latency_s=latency_s,
    )


def decided(
    draft: Draft,
    findings: Sequence[Finding],
    generation: Generation,
    reply: Reply | Fault,
    upstream: Upstream,
    model: str,
    most: Thresholds,
    latency_s: float,
) -> Decision:
    """The decision where the upstream was asked.

    Args:
        generation: the local answer. model: its model's name.
        reply: the upstream's answer, or why there is none: the local one stands then.
    """
    asked = "; ".join(one.why for one in findings)
    local = Decision(
        text=generation.text,
        finish_reason=generation.finish_reason,
        author="local",
        model_used=model,
        upstream=upstream.name,
        draft_tokens=draft.tokens,
        spilled_over=True,
        rules=tuple(one.rule for one in findings),
        reason=asked,
        cost=None,
        spent_tokens=None,
        latency_s=latency_s,
    )
    if isinstance(reply, Fault):
        return replace(local, reason=f"{upstream.name} {reply.why} ({asked})")
    likeness = similarity(generation.text, reply.text)
    compared = replace(
        local,
        reason=f"the two are {likeness:.0%} alike ({asked})",
        similarity=likeness,
        verified_tokens=len(generation.tokens) - generation.reasoning_tokens,
        cost=upstream.cost(reply.tokens_in, reply.tokens_out),
        spent_tokens=reply.tokens,
    )
    if likeness >= most.min_confidence:
        return compared
    return replace(
        compared,
        text=reply.text,
        finish_reason=reply.finish_reason,
        author="upstream",
        model_used=upstream.model,
        accepted=False,
    )


def sent(
    reply: Reply | Fault,
    generation: Generation | None,
    upstream: Upstream,
    model: str,
    latency_s: float,
) -> Decision:
    """The decision where a request asks for the upstream itself.

    Args:
        generation: the local answer, where the upstream gave none.
    """
    asked = f"the request asks for {upstream.name}"
    if isinstance(reply, Fault):
        assert generation is not None, "one of the two answers"
        return Decision(
            text=generation.text,
            finish_reason=generation.finish_reason,
            author="local",
            model_used=model,
            upstream=upstream.name,
            draft_tokens=0,
            spilled_over=True,
            reason=f"{upstream.name} {reply.why} ({asked})",
            cost=None,
            spent_tokens=None,
            latency_s=latency_s,
        )
    return Decision(
        text=reply.text,
        finish_reason=reply.finish_reason,
        author="upstream",
        model_used=upstream.model,
        upstream=upstream.name,
        draft_tokens=0,
        accepted=False,
        spilled_over=True,
        reason=asked,
        cost=upstream.cost(reply.tokens_in, reply.tokens_out),
        spent_tokens=reply.tokens,
        latency_s=latency_s,
    )


def similarity(one: str, other: str) -> float:
    """How alike two texts are, 0 to 1, whatever their case and white space."""
    from rapidfuzz.distance import Indel

    return float(Indel.normalized_similarity(_normalised(one), _normalised(other)))


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())
