"""JSON as it goes to a client."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

from mlxspec.conversations import DEEPEST, is_deeper

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)  # `dumps` makes one each time


def encoded(data: Any) -> bytes:
    """The bytes of JSON; half of a character, which a request may hold, is a question mark."""
    return _ENCODER.encode(data).encode(errors="replace")


class Json(JSONResponse):
    """A whole answer as JSON."""

    def render(self, content: Any) -> bytes:
        return encoded(content)


def require_json(value: Any) -> Any:
    """A value that a request holds and that JSON can say back.

    Raises:
        ValueError: it has a number or a letter that is none, or is too deep for a chat template.
    """
    if is_deeper(value):
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    try:
        _ENCODER.encode(value).encode()
    except ValueError as error:
        raise ValueError("a number or a letter in it is none of JSON's") from error
    return value
