"""The table of model pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from mlxspec.defaults import DEFAULT_DRAFT_TOKENS, DEFAULT_PAIR, HISTORY, MTP, DraftTokens
from mlxspec.errors import UnknownPair, nearest
from mlxspec.pairs.table_file import CHECKS, DEFAULT, TableFile

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Pair:
    """A target and what drafts for it.

    `target` and `draft` are Hugging Face repositories, as org/name or org/name@revision, folders,
    or `package:FOLDER` for what is inside this package. `draft` may also be several of them, of
    which the best is used, or HISTORY, which needs no model and is what None comes to, or MTP, the
    layer that the target was trained with. `sampling`,
    numbers by `params.NAMES`, `prompt`, `system` and `template_args`, arguments of the chat
    template, hold where a command line says nothing. `adapter` is a folder or repository of LoRA
    weights for the target, and `revision` the target's branch, tag or commit on the hub, in place
    of one in its name. `context` is the most tokens that a text may have, where that is less than
    the target can read. `trust_remote_code` runs code that its models bring. `draft_bits` quantises
    trained heads among the drafts, to 4 or 8 bits.

    `tags`, `note`, `source` (where a claim about its speed comes from) and `gb` (the size of its
    weights on disk, in 10^9 bytes) are for people who choose a pair.
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
    system: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    context: int | None = None
    tags: tuple[str, ...] = ()
    source: str = ""
    gb: float | None = None
    trust_remote_code: bool = False
    draft_bits: int | None = None

    @property
    def drafts(self) -> tuple[str, ...]:
        if self.draft is None:
            return ()
        return (self.draft,) if isinstance(self.draft, str) else self.draft

    @property
    def models(self) -> tuple[str, ...]:
        """Those of the drafts that are models of their own, or heads."""
        return tuple(draft for draft in self.drafts if draft not in (HISTORY, MTP))

    @property
    def draft_name(self) -> str | None:
        """The draft models and heads as one name; None where there are none."""
        return " + ".join(one for one in self.drafts if one != HISTORY) or None

    @property
    def target_name(self) -> str:
        """The target with its revision and its adapter, which have a text of their own."""
        at = f" at {self.revision}" if self.revision is not None else ""
        return self.target + at + (f" with {self.adapter}" if self.adapter is not None else "")

    def as_dict(self) -> dict[str, Any]:
        """Every key, but for the rare ones that it has not."""
        rare = {"adapter", "revision", "system", "context", "gb", "draft_bits"}
        return {k: v for k, v in asdict(self).items() if k not in rare or v is not None}


assert {one.name for one in fields(Pair)} == {"name", *CHECKS}


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
    return merged(map(TableFile.read, _tables(models)))


def merged(files: Iterable[TableFile]) -> dict[str, Pair]:
    """The pairs of files, each laid over those before it.

    Raises:
        TableError: a pair has no target.
    """
    entries: dict[str, dict[str, Any]] = {}
    last: dict[str, TableFile] = {}
    for file in files:
        for name, entry in file.sections.items():
            entries.setdefault(name, {}).update(entry)
            last[name] = file
    for name, entry in entries.items():
        if "target" not in entry:
            near = nearest(name, (one for one in entries if one != name))
            means = f"; or the name `{near}`" if near else ""
            raise last[name].bad([name], "has no `target`", f"a repository or a folder{means}")
    return {name: Pair(name=name, **entry) for name, entry in entries.items()}


def find_pair(name: str, models: Path | None = None) -> Pair:
    pairs = load_pairs(models)
    if name not in pairs:
        raise UnknownPair(name, pairs)
    return pairs[name]


def default_pair(models: Path | None = None) -> str:
    """The name of the pair that runs where none is named: the tables' own, or the embedded one.

    Raises:
        TableError: a table cannot be read, or names no pair.
    """
    files = [TableFile.read(path) for path in _tables(models)]
    for file in reversed(files):
        if file.default is not None:
            known = merged(files)
            if file.default not in known:
                near = nearest(file.default, known)
                raise file.bad(
                    [DEFAULT], f"is {file.default!r}, which is no pair", f"`{near or DEFAULT_PAIR}`"
                )
            return file.default
    return DEFAULT_PAIR


def package_folder(location: str) -> Path | None:
    """The folder that `package:FOLDER` means, or None for any other location."""
    scheme, _, folder = location.partition(":")
    return _PACKAGE / folder if scheme == "package" else None


def _tables(models: Path | None) -> list[Path]:
    if models is not None:
        return [shipped_table(), models]
    return [shipped_table(), *(path for path in [user_table()] if path.exists())]
