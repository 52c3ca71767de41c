"""Who may ask, and how much."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from mlxspec.serve.core.refusal import Refusal, error_response

# What is served without a key: whether the server lives, and a page that asks for the key.
OPEN = ("/", "/health", "/ready")


class Gate:
    """Lets those in who send the key, as `Authorization: Bearer` or `x-api-key`, and not too much.

    Args:
        key: None lets everybody in.
        most: bytes of a body. One that does not tell its length is counted by the application.
    """

    def __init__(self, app: ASGIApp, key: str | None, most: int) -> None:
        self._app = app
        self._key = key.encode() if key is not None else None
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], dict(scope["headers"]))
        answer = self._app if refusal is None else error_response(scope["path"], refusal)
        await answer(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Refusal | None:
        if self._key is not None and path not in OPEN and not _has(headers, self._key):
            return Refusal(
                401,
                "The key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._most:
            most = f"{self._most:,} bytes"
            return Refusal(413, f"The body is longer than {most}.", code="request_too_large")
        return None


def _has(headers: dict[bytes, bytes], key: bytes) -> bool:
    """Whether the key is among the headers, found out in a time that tells nothing about it."""
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
    return hmac.compare_digest(given, key)
