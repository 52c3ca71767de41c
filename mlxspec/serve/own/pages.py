"""`GET /`: a page to look at the server and to try it, all of it in one answer."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from mlxspec.files import page_style
from mlxspec.serve.core.service import Asked

router = APIRouter(tags=["The server"])

SCRIPTS = ("server.js", "draw.js", "page.js", "seen.js")


@router.get("/", response_class=HTMLResponse)
async def page(service: Asked) -> Response:
    """A page that shows what the server does."""
    content, headers = _page(needs_key=service.settings.key is not None)
    return HTMLResponse(content, headers=headers)


@cache
def _page(*, needs_key: bool) -> tuple[str, dict[str, str]]:
    """The page with its style and its script in it, and the headers that allow just these."""
    folder = Path(__file__).with_name("page")
    style = page_style(folder / "page.css")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    whole = (folder / "page.html").read_text(encoding="utf-8")
    whole = whole.replace('data-key="none"', f'data-key="{"needed" if needs_key else "none"}"')
    whole = whole.replace("/* page.css */", style).replace("/* page.js */", script)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return whole, {
        "Content-Security-Policy": "; ".join(f"{name} {of}" for name, of in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
