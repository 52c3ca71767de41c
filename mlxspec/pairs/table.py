"""The table of model pairs."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
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
from mlxspec.errors import TableError, UnknownPair, nearest

NO_DRAFT = "none"  # in a table: what drafts in the table below it is left out

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Pair:
    """A target and what drafts for it.

    `target` and `draft` are Hugging Face repositories, folders, or `package:FOLDER` for what is
    inside this package. `draft` may also be several of them, of which the best is used, or HISTORY,
    which needs no model and is what None comes to. `adapter` is a folder or repository of LoRA
    weights for the target, and `revision` the target's branch, tag or commit on the hub.
    """

    name: str
    target: str
    draft: str | tuple[str, ...] | None = None
    draft_tokens: DraftTokens = DEFAULT_DRAFT_TOKENS
    note: str = ""
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
    def drafting(self) -> str | None:
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


_TYPES: dict[str, type] = {
    "target": str,
    "draft": str,
    "draft_tokens": int,
    "note": str,
    "adapter": str,
    "revision": str,
}
assert {field.name for field in fields(Pair)} == {"name", *_TYPES}


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
        if key not in _TYPES:
            near = nearest(key, _TYPES)
            known = f"`{near}`" if near else ", ".join(f"`{known}`" for known in _TYPES)
            raise _bad(path, f"{name}.{key}", "is no key of a pair", known)
        if key == "draft_tokens" and value == AUTO:
            values[key] = value
            continue
        if key == "draft" and isinstance(value, list):
            values[key] = _several(path, f"{name}.{key}", value)
            continue
        if type(value) is not _TYPES[key]:
            kind = 'a whole number, or "auto"' if _TYPES[key] is int else "a string"
            raise _bad(path, f"{name}.{key}", f"is {value!r}", kind)
        if value == "" and key != "note":
            raise _bad(path, f"{name}.{key}", "is empty", "a repository or a folder")
        if isinstance(value, int) and not 0 <= value <= MAX_DRAFT_TOKENS:
            raise _bad(path, f"{name}.{key}", f"is {value}", f"0 to {MAX_DRAFT_TOKENS}")
        if key == "draft" and value == NO_DRAFT:
            value = None
        elif key in ("target", "draft", "adapter"):
            value = _located(path, f"{name}.{key}", str(value))
        values[key] = value
    return values


def _several(path: Path, key: str, drafts: list[Any]) -> tuple[str, ...]:
    if not drafts or not all(isinstance(draft, str) and draft for draft in drafts):
        raise _bad(path, key, f"is {drafts!r}", "a list of repositories or folders")
    return tuple(dict.fromkeys(_located(path, key, draft) for draft in drafts))


def _located(path: Path, key: str, location: str) -> str:
    """Folders in a table that begin with `.` or `~` are seen from the table's own folder."""
    if not location.startswith((".", "~")):
        return location
    try:
        return str((path.parent / Path(location).expanduser()).resolve())
    except RuntimeError as error:  # there is no home of that name
        raise _bad(path, key, f"is {location!r}", "a repository or a folder") from error


def _bad(path: Path, key: str, found: str, expected: str) -> TableError:
    return TableError(f"{path}: `{key}` {found}.", hint=f"Expected: {expected}.")
