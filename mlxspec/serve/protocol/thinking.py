"""How much a model is to reason, as far as its chat template can be told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlxspec.metrics import Tell
from mlxspec.serve.core.service import Service
from mlxspec.templates import source_of

# Not the field of an earlier turn that has the same name.
_SWITCHES = (r"\benable_thinking\b", r"(?<![.\w'\"])thinking\b(?!\w|['\"])")
_NEAREST = {"minimal": "low", "xhigh": "high", "max": "high"}


def template_options(
    service: Service, tell: Tell, given: Mapping[str, Any] | None = None, **asked: Any
) -> dict[str, Any]:
    """The option `template_args` of `Engine.request`; nothing where a request asks for nothing.

    Args:
        tell: called with what the template has no argument for.
        given: arguments that the request gives by their names.
        asked: what `template_args` takes.
    """
    tokenizer = service.engine.tokenizer
    found = template_args(source_of(tokenizer) if tokenizer is not None else "", tell, **asked)
    if not (found or given):
        return {}
    usual = service.settings.usual.get("template_args") or {}
    return {"template_args": {**usual, **found, **(given or {})}}


def template_args(
    template: str,
    tell: Tell,
    *,
    on: bool | None = None,
    effort: str | None = None,
    budget: int | None = None,
) -> dict[str, Any]:
    """Arguments of a chat template for what a request asks of the reasoning.

    Args:
        template: its source. on: whether to reason. effort: how much. budget: in tokens; each
            None where the request leaves it open.
    """
    arguments: dict[str, Any] = {}
    if effort == "none":
        on, effort = False, None
    if on is not None:
        switch = next(filter(None, (re.search(one, template) for one in _SWITCHES)), None)
        if switch is not None:
            arguments[switch[0]] = on
        else:
            tell(
                "the chat template has no switch for reasoning: the model reasons as it is used to"
            )
    if effort is not None and "reasoning_effort" in template:
        is_known = f"'{effort}'" in template or f'"{effort}"' in template
        arguments["reasoning_effort"] = effort if is_known else _NEAREST.get(effort, effort)
    elif effort is not None:
        tell("the chat template takes no effort of reasoning: the model reasons as it is used to")
    if budget is not None and "thinking_budget" in template:
        arguments["thinking_budget"] = budget
    elif budget is not None:
        tell("the chat template takes no budget of reasoning: max_tokens alone bounds it")
    return arguments
