"""Servers of OpenAI's protocol that people run beside this one: which of them answer, and what."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from ipaddress import ip_address
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from mlxspec.errors import UsageError

State = Literal["running", "refused", "absent", "failed"]

# By the ports that they listen on unless told otherwise.
KNOWN = {
    8000: "mlxspec or vLLM",
    1234: "LM Studio",
    8080: "mlx_lm.server",
    11434: "Ollama",
    52415: "exo",
}
_BY_OWNER = {"mlxspec": "mlxspec", "vllm": "vLLM", "library": "Ollama", "llamacpp": "llama.cpp"}
PATIENCE_S = 0.5
_MOST = 2**20  # bytes of a list of models
_NAMED = 3  # models in one line


@dataclass(frozen=True)
class Server:
    """A server as it was found.

    url: its root, without /v1. name: of the program, as far as its port or its models tell.
    state: "running" answers with its models, "refused" asks for another key, "absent" means that
    nobody listens, and "failed" that something else answers. words: the reason.
    """

    url: str
    name: str
    state: State
    models: tuple[str, ...] = ()
    words: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.state}, {self.words}"


def root_of(url: str) -> str:
    """The root of a server: of http://localhost:1234/v1 as of localhost:1234.

    Raises:
        UsageError: it is none.
    """
    given = url.strip()
    try:
        parts = urlsplit(given if "://" in given else f"http://{given}")
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(
            f"{url!r} is no address of a server.", hint="Give one such as http://localhost:1234."
        )
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageError(
            "The address of a server has more than a host and a path.",
            hint="Leave out the rest; --server-key-env names the variable with a key.",
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def looked_at(url: str, *, key: str | None = None, patience_s: float = PATIENCE_S) -> Server:
    """Ask a server for its models.

    Args:
        url: as `root_of` gives it. key: that it is asked with.
    """
    name = _named(url)
    try:
        with _opened(f"{url}/v1/models", key, patience_s) as answer:
            content: Any = json.loads(answer.read(_MOST))
        entries = [one for one in content["data"] if isinstance(one["id"], str)]
    except HTTPError as error:
        with error:
            return _refusing(url, name, error.code)
    except (URLError, OSError, HTTPException) as error:
        return _silent(url, name, error)
    except (ValueError, LookupError, TypeError):
        return Server(url, name, "failed", words="it answers, and not as OpenAI's API does")
    models = tuple(one["id"] for one in entries)
    owners = {str(one.get("owned_by", "")) for one in entries}
    name = next((_BY_OWNER[one] for one in owners if one in _BY_OWNER), name)
    more = f" and {len(models) - _NAMED} more" if len(models) > _NAMED else ""
    words = f"with {', '.join(models[:_NAMED]) or 'no model'}{more}"
    return Server(url, name, "running", models, words)


def known() -> Iterator[Server]:
    """The servers that people run on this machine, each at its usual port."""
    for port in KNOWN:
        yield looked_at(f"http://127.0.0.1:{port}")


def is_here(url: str) -> bool:
    """Whether a server is on this machine, where no proxy has to be asked."""
    return is_loopback(urlsplit(url).hostname or "")


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a host."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def key_of(variable: str | None, whose: str = "") -> str | None:
    """The key in a variable of the environment; None where no variable is named.

    Args:
        whose: it is, for the error.

    Raises:
        UsageError: there is none, or it cannot be sent. The error does not show it.
    """
    if variable is None:
        return None
    key, hint = os.environ.get(variable, "").strip(), f"Set it: export {variable}=…"
    if not key:
        raise UsageError(f"The environment has no key{whose} in {variable}.", hint=hint)
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"The key in {variable} has characters that no header can hold.", hint=hint
        )
    return key


def _named(url: str) -> str:
    parts = urlsplit(url)
    known_as = KNOWN.get(parts.port or 0) if is_here(url) else None
    return known_as or parts.netloc


def _opened(url: str, key: str | None, patience_s: float) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    proxies = [urllib.request.ProxyHandler({})] if is_here(url) else []
    opener = urllib.request.build_opener(*proxies)
    return opener.open(urllib.request.Request(url, headers=headers), timeout=patience_s)


def _refusing(url: str, name: str, status: int) -> Server:
    if status in (401, 403):
        return Server(url, name, "refused", words=f"it asks for a key, or for another ({status})")
    if status == 404:
        return Server(url, name, "failed", words="it has nothing at /v1/models (404)")
    return Server(url, name, "failed", words=f"it fails at /v1/models ({status})")


def _silent(url: str, name: str, error: Exception) -> Server:
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, ConnectionRefusedError):
        return Server(url, name, "absent", words="nobody listens there")
    if isinstance(reason, TimeoutError):
        return Server(url, name, "failed", words="it does not answer in time")
    if isinstance(reason, HTTPException | ConnectionError):
        return Server(url, name, "failed", words="it breaks off its answer")
    words = str(reason).partition("] ")[2] or str(reason)
    return Server(url, name, "absent", words=f"it cannot be reached: {words}")
