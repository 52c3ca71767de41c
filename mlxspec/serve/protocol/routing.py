"""Who answers a request: the local model, an upstream, or what the two decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxspec.cascade.cascade import Policy
from mlxspec.cascade.client import Question
from mlxspec.conversations import Message, messages_of
from mlxspec.decode.request import Request
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Tell
from mlxspec.serve.core.refusal import Refusal, refusal_of
from mlxspec.serve.core.service import Service
from mlxspec.serve.core.settings import LOCAL, Strategy
from mlxspec.serve.protocol.fields import Routing

_CHOICES = ("strategy", "upstream")
# The rules by their thresholds: one that a request gives a threshold is on.
_RULES = {
    "near_limit": "near_limit",
    "min_chars": "short",
    "markers": "uncertain",
    "min_logprob": "unlikely",
    "max_entropy": "undecided",
}


@dataclass(frozen=True)
class Route:
    """A request's way to an upstream.

    Args:
        messages: the conversation, the system's message included.
        max_tokens: that the request asks for; None where it leaves that open.
    """

    policy: Policy
    strategy: Strategy
    messages: list[Message]
    max_tokens: int | None

    def question(self, request: Request) -> Question:
        return Question.of(self.messages, self.max_tokens, request)


def route_of(
    service: Service,
    routing: Routing | None,
    options: Mapping[str, Any],
    tell: Tell,
    *,
    count: int = 1,
) -> Route | None:
    """The way that a request goes; None where the local model answers.

    Where a request asks for nothing, and the server's own strategy does not go with it, the local
    model answers, with a note.

    Args:
        options: those of `Engine.request` that the request means.
        tell: called with why the local model answers.
        count: of the texts that the request asks for.

    Raises:
        Refusal: the request asks for what cannot be done.
    """
    own = routing or Routing()
    policy, strategy = service.settings.upstream, own.strategy or service.settings.routing
    _require_known(policy, own)
    if strategy == LOCAL or policy is None:
        return None
    if (why := _unfit(options, count)) is not None:
        if own.strategy is not None:
            raise _refused("strategy", f"is {strategy}, and {why}. Ask for local, or leave it out")
        tell(f"the local model answers alone, because {why}")
        return None
    try:
        turns = _turns(service.with_usual(options))
    except MlxspecError as error:
        raise refusal_of(error) from error
    most = options.get("max_tokens", service.settings.max_tokens)
    return Route(_with(own, policy), strategy, turns, most)


def _turns(usual: Mapping[str, Any]) -> list[Message]:
    """The conversation of a request, with the system's message.

    Raises:
        PromptError: it is none.
    """
    messages = usual.get("messages")
    turns = [{"role": "user", "content": usual["prompt"]}] if messages is None else list(messages)
    if usual.get("system") is not None:
        turns.insert(0, {"role": "system", "content": usual["system"]})
    return list(messages_of(turns))


def _with(own: Routing, usual: Policy) -> Policy:
    """The server's upstream, with a request's own thresholds."""
    given = own.model_dump(exclude_none=True, exclude=set(_CHOICES))
    changes: dict[str, Any] = {
        name: None if value is False else value for name, value in given.items()
    }
    if "markers" in changes:
        changes["markers"] = tuple(changes["markers"] or ())
    on = {_RULES[name] for name in changes if name in _RULES}
    thresholds = replace(usual.thresholds, **changes)
    return replace(usual, thresholds=thresholds, off=usual.off - on)


def _require_known(policy: Policy | None, own: Routing) -> None:
    """Refuse an upstream that the server was not started with."""
    if policy is None:
        if own.strategy in (None, LOCAL) and own.upstream is None:
            return
        field = "upstream" if own.strategy in (None, LOCAL) else "strategy"
        raise _refused(field, "asks for an upstream, and this server was started without one")
    name = policy.client.upstream.name
    if own.upstream not in (None, name):
        raise _refused("upstream", f"is {own.upstream!r}, and this server has {name}")


def _unfit(options: Mapping[str, Any], count: int) -> str | None:
    """Why no upstream can answer a request; None where one can."""
    messages = options.get("messages") or ()
    if options.get("raw"):
        return "an upstream answers turns, and no text that is to go on"
    if options.get("tools") or any("tool_calls" in one for one in messages):
        return "an upstream is offered no tools"
    if options.get("logprobs") is not None:
        return "an upstream's answer has no log-probabilities of the local model"
    return "it decides on one text" if count > 1 else None


def _refused(field: str, why: str) -> Refusal:
    return Refusal(400, f"routing.{field} {why}.", param=f"routing.{field}")
