"""Where a pair's models are on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from mlxspec.defaults import MODEL
from mlxspec.device.memory import watched
from mlxspec.drafters import plugins
from mlxspec.errors import LoadError, OutOfMemory, TableError, UsageError, VocabularyMismatch
from mlxspec.metrics import Tell
from mlxspec.pairs import mtp
from mlxspec.pairs.contents import (
    ADAPTER_CONFIG,
    ADAPTERS,
    CONFIG,
    no_folder,
    require_adapter,
    require_complete,
)
from mlxspec.pairs.hub import MODEL_FILES, Repository, download, listing, repository_of
from mlxspec.pairs.table import Pair, load_pairs, package_folder

T = TypeVar("T")


@dataclass(frozen=True)
class Folders:
    """Where a pair's models are on this machine; `drafts` by the names that they go by.

    adapter: of the target; None where the pair has none.
    """

    target: Path
    drafts: Mapping[str, Path]
    adapter: Path | None = None


def fetch(pair: Pair, *, speculation: bool = True, tell: Tell | None = None) -> Folders:
    """Find a pair's folders, and download what is not on this machine yet.

    Args:
        speculation: False leaves the draft where it is.
        tell: called with why a draft is left out; None leaves none out, and raises.

    Raises:
        LoadError: a folder or repository is missing or not complete.
    """
    target, drafts = _model_folder(pair.target, pair, pair.revision), {}
    for name, location in named(pair).items() if speculation else ():
        folder = unless_left_out(partial(_draft_folder, location, pair, target), tell)
        if folder is not None:
            drafts[name] = folder
    return Folders(target, drafts, adapter_folder(pair))


def adapter_folder(pair: Pair) -> Path | None:
    """The folder of the pair's adapter; None where it has none.

    Raises:
        LoadError: there is no such folder or repository, or no adapter in it.
    """
    if pair.adapter is None:
        return None
    return _whole(located(pair.adapter), pair, (ADAPTER_CONFIG, ADAPTERS), require_adapter)


def named(pair: Pair) -> dict[str, str]:
    """The locations of a pair's draft models, by short names; one alone is the model."""
    locations = [location for location in pair.models if location not in plugins.installed()]
    if len(locations) == 1:
        return {MODEL: locations[0]}
    names = [_short_name(location) for location in locations]
    return {
        name if names.count(name) == 1 else location: location
        for name, location in zip(names, locations, strict=True)
    }


def _short_name(location: str) -> str:
    with suppress(LoadError):  # what is wrong with an address is said where it is looked for
        repository = repository_of(location)
        if repository is not None:
            return repository.short_name
    return Path(location).name


def unless_left_out(step: Callable[[], T], tell: Tell | None) -> T | None:
    """The result of `step`; None where it fails and its draft may be left out."""
    try:
        with watched("loading the draft"):
            return step()
    except (LoadError, VocabularyMismatch, OutOfMemory) as error:
        if tell is None:
            raise
        tell(f"no speculation: {error.message}")
        return None


def _draft_folder(location: str, pair: Pair, target: Path) -> Path:
    """The folder of a draft: of a checkpoint that is wanted for its MTP layer, that part alone."""
    at = located(location)
    if isinstance(at, Repository):
        patterns = draft_files(at, pair, target)
        if patterns != MODEL_FILES:
            return download(at, pair.name, patterns)
    return _model_folder(location, pair)


def draft_files(at: Repository, pair: Pair, target: Path) -> Sequence[str]:
    """What a draft's repository is wanted for: of an original checkpoint, its MTP layer alone.

    Its configuration and its index tell, and are downloaded where the target's layer is known.

    Args:
        target: a folder with the target's configuration.

    Raises:
        LoadError: the hub does not give them, or cannot be reached.
    """
    if mtp.is_target(target):
        folder = download(at, pair.name, mtp.ABOUT)
        files = mtp.files_of(folder)
        if files and mtp.is_original_of(folder, target):
            return (*mtp.ABOUT, *files)
    return MODEL_FILES


def wanted(pair: Pair, *, speculation: bool = True) -> list[tuple[Repository, Sequence[str]]]:
    """The repositories of a pair, its target first, and the files that it needs of each.

    Args:
        speculation: False leaves the drafts out.

    Raises:
        LoadError: a location is wrong, or the hub does not give what tells; see `draft_files`.
    """
    target = located(pair.target, pair.revision)
    found: list[tuple[Repository, Sequence[str]]] = []
    if isinstance(target, Repository):
        found.append((target, MODEL_FILES))
    places = [located(location) for location in named(pair).values()] if speculation else []
    drafts = [at for at in places if isinstance(at, Repository)]
    if drafts:
        if isinstance(target, Repository):
            target = download(target, pair.name, (CONFIG,))
        found += [(at, draft_files(at, pair, target)) for at in drafts]
    if pair.adapter is not None and isinstance(at := located(pair.adapter), Repository):
        found.append((at, (ADAPTER_CONFIG, ADAPTERS)))
    return found


def _model_folder(location: str, pair: Pair, revision: str | None = None) -> Path:
    return _whole(located(location, revision), pair, MODEL_FILES, require_complete)


def _whole(
    at: Path | Repository,
    pair: Pair,
    patterns: Sequence[str],
    require: Callable[[Path, str | None, Callable[[], Sequence[str]]], None],
) -> Path:
    """The folder of what was located, once it is there and holds what it must."""
    if isinstance(at, Path):
        require(at, None, tuple)
        return at
    folder = download(at, pair.name, patterns)
    require(folder, at.name, partial(listing, at))
    return folder


def located(location: str, revision: str | None = None) -> Path | Repository:
    """What a location names: a folder of this machine, which may be missing, or a repository.

    Raises:
        LoadError, UsageError: it cannot be either.
    """
    if not location.strip():
        raise UsageError("A model's name is empty.", hint="Give a folder or a repository.")
    inside = package_folder(location)
    folder = inside or _expanded(location)
    if not _is_possible(folder):
        raise no_folder(folder)
    is_here = folder.exists()
    repository = None if inside or is_here else repository_of(location)
    if repository is None:
        if is_here and revision is not None:
            raise LoadError(
                f"{location} is a folder, and has no revision {revision}.",
                hint="A revision is one of a repository: leave it out.",
            )
        if not is_here and _is_pair(location):
            raise LoadError(
                f"There is no model folder {location}.",
                hint=f"{location} is a pair: use --pair {location}, or load({location!r}).",
            )
        return folder
    return Repository(repository.name, revision or repository.revision)


def _is_pair(name: str) -> bool:
    with suppress(TableError):  # a table that cannot be read is not what went wrong here
        return name in load_pairs()
    return False


def _is_possible(path: Path) -> bool:
    """Whether a folder may have such a name: it is not too long, and has no zero byte."""
    try:
        path.is_dir()
    except (OSError, ValueError):
        return False
    return "\0" not in str(path)


def _expanded(location: str) -> Path:
    try:
        return Path(location).expanduser()
    except RuntimeError:  # there is no home of that name, and so no such folder
        return Path(location)
