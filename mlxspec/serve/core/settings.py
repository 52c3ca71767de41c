"""The choices that a server was started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlxspec.cascade.cascade import Policy

Strategy = Literal["local", "speculative_decoding", "upstream"]
LOCAL: Strategy = "local"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The choices that a server was started with, and those of its limits.

    Args:
        name: of the model in answers and in the list of models.
        about: the pair, the target and the draft, as `/stats` tells them.
        usual: options of `Engine.request` that hold where a request says nothing.
        key: what clients must send; None lets everybody in.
        max_rows: texts written at a time. max_queue: texts that may wait beside them.
        max_tokens: the most that a request may ask for, and what it gets where it says nothing;
            None is the end of the context.
        max_prompt_tokens: None is the model's context.
        max_choices: the largest `n`.
        max_body_bytes: of a request.
        upstream: another host that may be asked, and when; None where there is none.
        routing: the strategy of requests that name none; see `protocol.routing`.
        log_texts: whether the log has prompts, and what was written.
        stuck_s: seconds without a round after which the server no longer calls itself ready.
    """

    name: str
    about: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    max_rows: int = 8
    max_queue: int = 64
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    max_choices: int = 8
    max_body_bytes: int = 8 * 2**20
    upstream: Policy | None = None
    routing: Strategy = LOCAL
    log_texts: bool = False
    stuck_s: float = 60.0
