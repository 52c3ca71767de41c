"""One file of the table of pairs: its keys, and errors that name the file, the line and the key."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxspec.defaults import AUTO, MAX_DRAFT_TOKENS, DraftTokens
from mlxspec.errors import TableError, UsageError, nearest
from mlxspec.params import NAMES, WHOLE, sampling_params

NO_DRAFT = "none"  # what drafts in the table below it is left out
DEFAULT = "default"  # the one key that stands in no section: the pair that runs where none is named

_KEYS_TWICE = ("twice", "overwrite", "Duplicate")  # the words of tomllib for a name that is taken


@dataclass(frozen=True)
class TableFile:
    """The sections of a file by the names of their pairs, and the pair that it chooses."""

    path: Path
    text: str
    sections: Mapping[str, Mapping[str, Any]]
    default: str | None = None

    @classmethod
    def read(cls, path: Path) -> TableFile:
        """Read a file and check every key of it.

        Raises:
            TableError: it cannot be read, or a key is not what it should be.
        """
        return cls.parsed(path, text_of(path))

    @classmethod
    def parsed(cls, path: Path, text: str) -> TableFile:
        """The same of a text that is to become the file `path`."""
        content = content_of(path, text)
        place = Place(path, text)
        default = content.pop(DEFAULT, None)
        if default is not None:
            _string(place.at(DEFAULT), default)
        sections = {name: _pair(place.at(name), entry) for name, entry in content.items()}
        return cls(path, text, sections, default)

    def bad(self, keys: Sequence[str], found: str, expected: str) -> TableError:
        """An error about a key of this file, by the names that lead to it."""
        return Place(self.path, self.text, tuple(keys)).bad(found, expected)


def text_of(path: Path) -> str:
    """The text of a table; raises TableError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TableError(
            f"The table {path} cannot be read: {error.strerror}.", hint="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise _no_toml(path, f"{error}") from error


def content_of(path: Path, text: str) -> dict[str, Any]:
    """What a table holds; raises TableError where its text is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _no_toml(path, str(error)) from error


@dataclass(frozen=True)
class Place:
    """A key of a file, by the names that lead to it."""

    path: Path
    text: str
    keys: tuple[str, ...] = ()

    def at(self, key: str) -> Place:
        return Place(self.path, self.text, (*self.keys, key))

    def bad(self, found: str, expected: str) -> TableError:
        name = ".".join(self.keys)
        return TableError(
            f"{self.path}, line {line_of(self.text, self.keys)}: `{name}` {found.rstrip('.')}.",
            hint=f"Expected: {expected.rstrip('.')}.",
        )

    def unknown(self, found: str, known: Iterable[str]) -> TableError:
        """An error about a name that is none of those known."""
        names = list(known)
        near = nearest(self.keys[-1], names)
        listed = f"`{near}`" if near else ", ".join(f"`{name}`" for name in names)
        return self.bad(found, listed)


Checks = Mapping[str, Callable[[Place, Any], Any]]


def line_of(text: str, keys: Sequence[str]) -> int:
    """The line on which a key stands: the first behind the longest beginning that lacks it."""
    lines = text.splitlines(keepends=True)
    before = 0
    for count in range(1, len(lines) + 1):
        try:
            place: Any = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:  # it ends within a value
            continue
        for key in keys:
            place = _last(place)
            if not isinstance(place, dict) or key not in place:
                break
            place = place[key]
        else:
            return before + 1
        before = count
    return before


def _last(place: Any) -> Any:
    return place[-1] if isinstance(place, list) and place else place


def _no_toml(path: Path, why: str) -> TableError:
    hint = "Correct it there, or remove it."
    if any(word in why for word in _KEYS_TWICE):
        hint = "A name has one section, and a key stands in it once: join the two, or rename one."
    return TableError(f"The table {path} is not valid TOML: {why}.", hint=hint)


# --- keys -------------------------------------------------------------------------------


def checked(place: Place, entry: Any, checks: Checks, strange: str, holds: str) -> dict[str, Any]:
    """The values of a section.

    Args:
        checks: what makes a value of each key. strange: what a key is that is none of them.
        holds: what a section has.

    Raises:
        TableError: it is no section, or a key is not what it should be.
    """
    if not isinstance(entry, dict):
        raise place.bad("is not a table", f"a section with {holds}")
    for key in entry:
        if key not in checks:
            raise place.at(key).unknown(strange, checks)
    return {key: checks[key](place.at(key), value) for key, value in entry.items()}


def _pair(place: Place, entry: Any) -> dict[str, Any]:
    return checked(place, entry, CHECKS, "is no key of a pair", "a target and a draft")


def _string(place: Place, value: Any) -> str:
    if not isinstance(value, str):
        raise place.bad(f"is {value!r}", "a string")
    return value


def _words(place: Place, value: Any) -> str:
    if not _string(place, value).strip():
        raise place.bad("is empty", "a text, or no such key")
    return str(value)


def flag(place: Place, value: Any) -> bool:
    if not isinstance(value, bool):
        raise place.bad(f"is {value!r}", "true or false")
    return value


def _tokens(place: Place, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise place.bad(f"is {value!r}", "a number of tokens, at least 1")
    return value


def _bits(place: Place, value: Any) -> int:
    if value not in (4, 8):
        raise place.bad(f"is {value!r}", "4 or 8")
    return int(value)


def _size(place: Place, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise place.bad(f"is {value!r}", "a number of gigabytes, such as 4.9")
    return float(value)


def _tags(place: Place, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tag, str) and tag for tag in value):
        raise place.bad(f"is {value!r}", 'a list of words, such as ["code", "16gb"]')
    return tuple(dict.fromkeys(value))


def _template_args(place: Place, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise place.bad(f"is {value!r}", "a table such as { enable_thinking = false }")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:  # a date or a time, or no number
        raise place.bad(
            "has a value that JSON lacks", "strings, numbers, true and false"
        ) from error
    return value


def _location(place: Place, value: Any) -> str:
    if not _string(place, value):
        raise place.bad("is empty", "a repository or a folder")
    return _located(place, value)


def _draft(place: Place, value: Any) -> str | tuple[str, ...] | None:
    if value == NO_DRAFT:
        return None
    if not isinstance(value, list):
        return _location(place, value)
    if not value or not all(isinstance(draft, str) and draft for draft in value):
        raise place.bad(f"is {value!r}", "a list of repositories or folders")
    return tuple(dict.fromkeys(_located(place, draft) for draft in value))


def _draft_tokens(place: Place, value: Any) -> DraftTokens:
    if value == AUTO:
        return AUTO
    if type(value) is not int:
        raise place.bad(f"is {value!r}", 'a whole number, or "auto"')
    if not 0 <= value <= MAX_DRAFT_TOKENS:
        raise place.bad(f"is {value}", f"0 to {MAX_DRAFT_TOKENS}")
    return value


def _sampling(place: Place, values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        expected = "a table such as { temperature = 0.7, top_p = 0.9 }"
        raise place.bad(f"is {values!r}", expected)
    for name, value in values.items():
        if name not in NAMES:
            raise place.at(name).unknown("is no sampling parameter", NAMES)
        is_whole = name in WHOLE
        if type(value) is not int and (is_whole or type(value) is not float):
            expected = "a whole number" if is_whole else "a number"
            raise place.at(name).bad(f"is {value!r}", expected)
    try:
        sampling_params(values)
    except UsageError as error:
        raise place.bad(f"cannot be used: {error.message}", error.hint) from error
    return values


def _located(place: Place, location: str) -> str:
    """Folders in a table that begin with `.` or `~` are seen from the table's own folder."""
    if not location.startswith((".", "~")):
        return location
    try:
        return str((place.path.parent / Path(location).expanduser()).resolve())
    except RuntimeError as error:  # there is no home of that name
        raise place.bad(f"is {location!r}", "a repository or a folder") from error


CHECKS: Checks = {
    "target": _location,
    "draft": _draft,
    "draft_tokens": _draft_tokens,
    "note": _string,
    "sampling": _sampling,
    "prompt": _words,
    "system": _words,
    "template_args": _template_args,
    "context": _tokens,
    "tags": _tags,
    "source": _string,
    "gb": _size,
    "adapter": _location,
    "revision": _string,
    "trust_remote_code": flag,
    "draft_bits": _bits,
}
