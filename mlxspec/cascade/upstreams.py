"""The table of upstreams: hosts that answer in OpenAI's protocol, and the rules' thresholds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from platformdirs import user_config_path

from mlxspec.cascade.rules import Thresholds
from mlxspec.errors import TableError, UsageError, nearest
from mlxspec.pairs.servers import is_loopback, key_of
from mlxspec.pairs.table_file import Checks, Place, checked, content_of, flag, text_of

TIMEOUT_S = 30.0
_KEY_NEEDED = ("base_url", "model")
_EXAMPLE = '[upstreams.NAME] with base_url = "https://…/v1", model = "…" and api_key_env = "VAR"'


@dataclass(frozen=True)
class Upstream:
    """A host and its model.

    Args:
        api_key_env: the environment variable that holds its key; None asks without one.
        timeout_s: the most seconds for an answer, further tries included.
        price_in, price_out: of a million tokens read and written, in any currency.
        prediction: whether it takes OpenAI's `prediction`, and so the draft.
    """

    name: str
    base_url: str
    model: str
    api_key_env: str | None = None
    timeout_s: float = TIMEOUT_S
    price_in: float | None = None
    price_out: float | None = None
    prediction: bool = False

    def key(self) -> str | None:
        """The key, from the environment alone.

        Raises:
            UsageError: there is none, or it cannot be sent. The error does not show it.
        """
        return key_of(self.api_key_env, f" for the upstream {self.name}")

    def cost(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """What an answer costs; None without prices, or where its tokens are not known."""
        if self.price_in is None or self.price_out is None:
            return None
        if tokens_in is None or tokens_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


@dataclass(frozen=True)
class Upstreams:
    """The upstreams of a file by their names, and the thresholds that it sets."""

    path: Path
    by_name: Mapping[str, Upstream]
    thresholds: Thresholds = field(default_factory=Thresholds)

    def named(self, name: str) -> Upstream:
        """One of them; raises UsageError where the file has none of that name."""
        if name in self.by_name:
            return self.by_name[name]
        near = nearest(name, self.by_name)
        known = ", ".join(self.by_name)
        means = f"Did you mean `{near}`?" if near else f"It has {known}." if known else ""
        raise UsageError(
            f"{self.path} has no upstream named {name!r}.",
            hint=means or f"Write a section {_EXAMPLE}.",
        )


def user_upstreams() -> Path:
    return user_config_path("mlxspec") / "upstreams.toml"


def load_upstreams(path: Path | None = None) -> Upstreams:
    """The table in the user's configuration, or another file.

    Raises:
        TableError: it cannot be read, or a key is not what it should be.
    """
    if path is None and not user_upstreams().exists():
        raise TableError(
            f"There is no table of upstreams at {user_upstreams()}.",
            hint=f"Write one, with a section {_EXAMPLE}.",
        )
    path = path or user_upstreams()
    text = text_of(path)
    content = content_of(path, text)
    place = Place(path, text)
    for key in content:
        if key not in ("upstreams", "rules"):
            raise place.at(key).unknown("is no section of this table", ("upstreams", "rules"))
    sections = content.get("upstreams", {})
    if not isinstance(sections, dict):
        raise place.at("upstreams").bad("is not a table", "a section with keys")
    found = {name: _upstream(place.at("upstreams").at(name), one) for name, one in sections.items()}
    rules = checked(place.at("rules"), content.get("rules", {}), _RULES, "is no threshold", "keys")
    return Upstreams(path, found, Thresholds(**rules))


def _upstream(place: Place, entry: Any) -> Upstream:
    values = checked(place, entry, _UPSTREAM, "is no key of an upstream", "keys")
    for key in _KEY_NEEDED:
        if key not in values:
            raise place.bad(f"has no `{key}`", _EXAMPLE)
    url = urlsplit(values["base_url"])
    if "api_key_env" in values and url.scheme == "http" and not is_loopback(url.hostname or ""):
        raise place.at("base_url").bad(
            "would send the key over http, where others can read it", "an address with https"
        )
    return Upstream(name=place.keys[-1], **values)


# --- keys. No error shows a value that may hold a key by mistake --------------------------


def _address(place: Place, value: Any) -> str:
    expected = 'an address such as "https://api.example.com/v1"'
    try:
        url = urlsplit(value) if isinstance(value, str) else None
        fits = url is not None and url.scheme in ("http", "https") and bool(url.hostname)
        fits = fits and url is not None and (url.port is None or url.port > 0)
    except ValueError:
        fits = False
    if not fits or url is None:
        raise place.bad("is no address of a host", expected)
    if url.username is not None or url.query or url.fragment:
        raise place.bad("has more than a host and a path", f"{expected}; the key in api_key_env")
    return str(value)


def _variable(place: Place, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise place.bad(
            "is no name of an environment variable", "the variable that holds the key, not the key"
        )
    return value


def _words(place: Place, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise place.bad(f"is {value!r}", "the name of a model")
    return value


def _number(low: float, high: float, expected: str) -> Callable[[Place, Any], float]:
    def check(place: Place, value: Any) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise place.bad(f"is {value!r}", expected)
        return float(value)

    return check


def _count(place: Place, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise place.bad(f"is {value!r}", "a whole number, at least 1")
    return value


def _list(place: Place, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise place.bad(f"is {value!r}", 'a list of words, such as ["maybe", "I think"]')
    return tuple(dict.fromkeys(value))


def _or_off(check: Callable[[Place, Any], Any], off: Any = None) -> Callable[[Place, Any], Any]:
    """The same check, and `false` turns the rule off."""
    return lambda place, value: off if value is False else check(place, value)


_SHARE = _number(0, 1, "a number from 0 to 1")
_PRICE = _number(0, 1e9, "the price of a million tokens")
_UPSTREAM: Checks = {
    "base_url": _address,
    "model": _words,
    "api_key_env": _variable,
    "timeout_s": _number(0.001, 86400, "a number of seconds, such as 30"),
    "price_in": _PRICE,
    "price_out": _PRICE,
    "prediction": flag,
}
_RULES: Checks = {
    "max_draft_tokens": _count,
    "min_confidence": _SHARE,
    "near_limit": _or_off(_SHARE),
    "min_chars": _or_off(_count),
    "markers": _or_off(_list, ()),
    "min_logprob": _or_off(_number(-1e3, 0, "a log-probability, at most 0, or false")),
    "max_entropy": _or_off(_number(0, 1e3, "an entropy in nats, at least 0, or false")),
}
assert {one.name for one in fields(Upstream)} == {"name", *_UPSTREAM}
assert {one.name for one in fields(Thresholds)} == set(_RULES)
