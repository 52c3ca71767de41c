"""The table of model pairs."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from mlxspec.defaults import (
    AUTO,
    DEFAULT_DRAFT_TOKENS,
    HISTORY,
    MAX_DRAFT_TOKENS,
    DraftTokens,
)
from mlxspec.errors import TableError, UnknownPair, UsageError, nearest
from mlxspec.params import NAMES, WHOLE, sampling_params

NO_DRAFT = "none"  # in a table: what drafts in the table below it is left out

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Pair:
    """A target and what drafts for it.

    `target` and `draft` are Hugging Face repositories, as org/name or org/name@revision, folders,
    or `package:FOLDER` for what is inside this package. `draft` may also be several of them, of
    which the best is used, or HISTORY, which needs no model and is what None comes to. `sampling`,
    numbers by `params.NAMES`, and `prompt` hold where a command line says nothing. `adapter` is
    a folder or repository of LoRA weights for the target, and `revision` the target's branch, tag
    or commit on the hub, in place of one in its name.
    """

    name: str
    target: str
    draft: str | tuple[str, ...] | None = None
    draft_tokens: DraftTokens = DEFAULT_DRAFT_TOKENS
    note: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict, hash=False)
    prompt: str | None = None
    adapter: str | None = None
    revision: str | None = None

    @property
    def drafts(self) -> tuple[str, ...]:
        if self.draft is None:
            return ()
        return (self.draft,) if isinstance(self.draft, str) else self.draft

    @property
    def models(self) -> tuple[str, ...]:
        """Those of the drafts that are models."""
        return tuple(draft for draft in self.drafts if draft != HISTORY)

    @property
    def draft_name(self) -> str | None:
        """The draft models as one name; None where there are none."""
        return " + ".join(self.models) or None

    @property
    def target_name(self) -> str:
        """The target with its revision and its adapter, which have a text of their own."""
        at = f" at {self.revision}" if self.revision is not None else ""
        return self.target + at + (f" with {self.adapter}" if self.adapter is not None else "")

    def as_dict(self) -> dict[str, Any]:
        """Every key, but for an adapter and a revision that it has not."""
        rare = {"adapter", "revision"}
        return {k: v for k, v in asdict(self).items() if k not in rare or v is not None}


def shipped_table() -> Path:
    inside = _PACKAGE / "models.toml"
    return inside if inside.exists() else _PACKAGE.parent / "models.toml"


def user_table() -> Path:
    return user_config_path("mlxspec") / "models.toml"


def load_pairs(models: Path | None = None) -> dict[str, Pair]:
    """The shipped pairs, with the user's table, or the file `models`, laid over them.

    An entry may give some keys of a pair that exists, or a whole new pair.

    Raises:
        TableError: a table cannot be read, or a key is not what it should be.
    """
    entries: dict[str, dict[str, Any]] = {}
    sources: dict[str, Path] = {}
    for path in _tables(models):
        for name, entry in _read(path).items():
            entries.setdefault(name, {}).update(_checked(path, name, entry))
            sources[name] = path
    for name, entry in entries.items():
        if "target" not in entry:
            raise _bad(sources[name], name, "has no `target`", "a repository or a folder")
    return {name: Pair(name=name, **entry) for name, entry in entries.items()}


def find_pair(name: str, models: Path | None = None) -> Pair:
    pairs = load_pairs(models)
    if name not in pairs:
        raise UnknownPair(name, pairs)
    return pairs[name]


def package_folder(location: str) -> Path | None:
    """The folder that `package:FOLDER` means, or None for any other location."""
    scheme, _, folder = location.partition(":")
    return _PACKAGE / folder if scheme == "package" else None


def _tables(models: Path | None) -> list[Path]:
    if models is not None:
        return [shipped_table(), models]
    return [shipped_table(), *(path for path in [user_table()] if path.exists())]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(
            f"The table {path} cannot be read: {error.strerror}.", hint="Check the path."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TableError(
            f"The table {path} is not valid TOML: {error}.", hint="Correct it there, or remove it."
        ) from error


def _checked(path: Path, name: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise _bad(path, name, "is not a table", "a section with a target and a draft")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in _CHECKS:
            near = nearest(key, _CHECKS)
            known = f"`{near}`" if near else ", ".join(f"`{known}`" for known in _CHECKS)
            raise _bad(path, f"{name}.{key}", "is no key of a pair", known)
        values[key] = _CHECKS[key](path, f"{name}.{key}", value)
    return values


def _string(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _bad(path, key, f"is {value!r}", "a string")
    return value


def _words(path: Path, key: str, value: Any) -> str:
    if not _string(path, key, value).strip():
        raise _bad(path, key, "is empty", "a text to continue, or no such key")
    return str(value)


def _location(path: Path, key: str, value: Any) -> str:
    if not _string(path, key, value):
        raise _bad(path, key, "is empty", "a repository or a folder")
    return _located(path, key, value)


def _draft(path: Path, key: str, value: Any) -> str | tuple[str, ...] | None:
    if value == NO_DRAFT:
        return None
    if not isinstance(value, list):
        return _location(path, key, value)
    if not value or not all(isinstance(draft, str) and draft for draft in value):
        raise _bad(path, key, f"is {value!r}", "a list of repositories or folders")
    return tuple(dict.fromkeys(_located(path, key, draft) for draft in value))


def _draft_tokens(path: Path, key: str, value: Any) -> DraftTokens:
    if value == AUTO:
        return AUTO
    if type(value) is not int:
        raise _bad(path, key, f"is {value!r}", 'a whole number, or "auto"')
    if not 0 <= value <= MAX_DRAFT_TOKENS:
        raise _bad(path, key, f"is {value}", f"0 to {MAX_DRAFT_TOKENS}")
    return value


def _sampling(path: Path, key: str, values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        expected = "a table such as { temperature = 0.7, top_p = 0.9 }"
        raise _bad(path, key, f"is {values!r}", expected)
    for name, value in values.items():
        if name not in NAMES:
            near = nearest(name, NAMES)
            known = f"`{near}`" if near else ", ".join(f"`{known}`" for known in NAMES)
            raise _bad(path, f"{key}.{name}", "is no sampling parameter", known)
        is_whole = name in WHOLE
        if type(value) is not int and (is_whole or type(value) is not float):
            expected = "a whole number" if is_whole else "a number"
            raise _bad(path, f"{key}.{name}", f"is {value!r}", expected)
    try:
        sampling_params(values)
    except UsageError as error:
        raise _bad(path, key, f"cannot be used: {error.message}", error.hint) from error
    return values


_CHECKS: dict[str, Callable[[Path, str, Any], Any]] = {
    "target": _location,
    "draft": _draft,
    "draft_tokens": _draft_tokens,
    "note": _string,
    "sampling": _sampling,
    "prompt": _words,
    "adapter": _location,
    "revision": _string,
}
assert {one.name for one in fields(Pair)} == {"name", *_CHECKS}


def _located(path: Path, key: str, location: str) -> str:
    """Folders in a table that begin with `.` or `~` are seen from the table's own folder."""
    if not location.startswith((".", "~")):
        return location
    try:
        return str((path.parent / Path(location).expanduser()).resolve())
    except RuntimeError as error:  # there is no home of that name
        raise _bad(path, key, f"is {location!r}", "a repository or a folder") from error


def _bad(path: Path, key: str, found: str, expected: str) -> TableError:
    return TableError(
        f"{path}: `{key}` {found.rstrip('.')}.", hint=f"Expected: {expected.rstrip('.')}."
    )
