"""The application: its routes, and what becomes of errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.types import ASGIApp

from mlxspec._version import __version__
from mlxspec.serve.anthropic import messages
from mlxspec.serve.core.refusal import Refusal, error_response
from mlxspec.serve.core.service import Service
from mlxspec.serve.core.watchdog import watch_over
from mlxspec.serve.gate import Gate
from mlxspec.serve.logbook import Logbook
from mlxspec.serve.openai import chat, completions, responses
from mlxspec.serve.own import about, generate, pages, watching

_ROUTES = (about, chat, completions, generate, messages, pages, responses, watching)


def make_app(service: Service) -> FastAPI:
    """The application of a service, open to everybody."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker, stuck_s = service.worker, service.settings.stuck_s
        watchdog = asyncio.create_task(watch_over(worker, stuck_s, worker.tell))
        yield
        watchdog.cancel()
        service.close()

    app = FastAPI(
        title="mlxspec",
        version=__version__,
        lifespan=lifespan,
        max_body_size=service.settings.max_body_bytes,
        docs_url=None,  # its pages would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for module in _ROUTES:
        app.include_router(module.router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _broken)
    return app


def make_served(service: Service) -> ASGIApp:
    """The application behind its gate and its log, for an ASGI server with one process."""
    settings = service.settings
    gate = Gate(make_app(service), key=settings.key, most=settings.max_body_bytes)
    return Logbook(gate, service.ended, service.worker.tell)


async def _refused(http: Http, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error_response(http.url.path, error)


async def _invalid(http: Http, error: Exception) -> Response:
    """A field of a wrong type or range, by its name."""
    assert isinstance(error, RequestValidationError)
    # Where there are alternatives, the one that fits best is found to be wrong deep inside.
    first: dict[str, Any] = max(error.errors(), key=lambda one: len(one["loc"]))
    param = ".".join(str(one) for one in first["loc"][1:] if _is_name(one)) or None
    message = f"{param or 'The body'}: {first['msg'].removeprefix('Value error, ')}."
    if first["type"] == "union_tag_invalid":
        known, tag = first["ctx"]["expected_tags"], first["ctx"]["tag"]
        message = f"{param} is of type {tag!r}, and only {known} can be read: leave it out."
    if first["type"] == "literal_error":
        known = first["ctx"]["expected"].replace("False", "false")
        message = f"{param} is {json.dumps(first['input'])}, and this server takes {known} alone."
    if first["type"] == "union_tag_not_found":
        message = f"{param} is no object with a type."
    if first["type"] == "json_invalid":
        param, message = None, f"The body is no JSON: {first.get('ctx', {}).get('error', '')}."
    return error_response(http.url.path, Refusal(400, message, param=param))


def _is_name(part: str | int) -> bool:
    """Whether a part of a place names a field, and no alternative of its type."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float"))


async def _http(http: Http, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, str(error.detail), headers=error.headers or {})
    if error.status_code == 404:
        refusal.message = f"There is nothing at {http.url.path}; /openapi.json lists what there is."
    return error_response(http.url.path, refusal)


async def _broken(http: Http, error: Exception) -> Response:
    message = "The server failed on this request; its log says where."
    return error_response(http.url.path, Refusal(500, message, kind="server_error"))
