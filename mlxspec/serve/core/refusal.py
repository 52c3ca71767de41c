"""A request that is not answered: why, in words, and as a status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from mlxspec.errors import MlxspecError, UsageError
from mlxspec.serve.core.wire import Json

INVALID = "invalid_request_error"


@dataclass
class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP. message: what is wrong, and what to do. kind: its type, as OpenAI names it.
        param: the field at fault, where there is one. code: a name for programs.
    """

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def refusal_of(error: MlxspecError) -> Refusal:
    """An error of ours as an answer: 400 where the request is at fault, else 500."""
    message = f"{error.message} {error.hint}".strip()
    if isinstance(error, UsageError):
        code = "context_length_exceeded" if "context is" in error.message else None
        return Refusal(400, message, code=code)
    return Refusal(500, message, kind="server_error")


def full(seconds: int) -> Refusal:
    """More requests wait than may; the client is to come again after some seconds."""
    return Refusal(
        429,
        f"Too many requests wait. Try again in {seconds} s.",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(seconds)},
    )


def unready(why: str) -> Refusal:
    """The server cannot take a request now."""
    return Refusal(
        503,
        f"The server {why}. Try again in a moment.",
        kind="service_unavailable",
        headers={"Retry-After": "2"},
    )


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """The body of an error as OpenAI has it."""
    return {
        "error": {
            "message": refusal.message,
            "type": refusal.kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


_ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(refusal: Refusal) -> dict[str, Any]:
    """The body of an error as Anthropic has it."""
    usual = INVALID if refusal.status < 500 else "api_error"
    kind = _ANTHROPIC.get(refusal.status, usual)
    return {"type": "error", "error": {"type": kind, "message": refusal.message}}


def error_response(path: str, refusal: Refusal) -> Response:
    """An error in the form of the protocol that a path belongs to."""
    form = anthropic_error if path.startswith("/v1/messages") else openai_error
    return Json(form(refusal), refusal.status, headers=dict(refusal.headers))
