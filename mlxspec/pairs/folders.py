"""Where a pair's models are: folders and repositories, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

from mlxspec.defaults import MODEL
from mlxspec.device.memory import watched
from mlxspec.drafters import plugins
from mlxspec.errors import LoadError, OutOfMemory, VocabularyMismatch
from mlxspec.metrics import Tell
from mlxspec.pairs.table import Pair, package_folder

T = TypeVar("T")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


@dataclass(frozen=True)
class Folders:
    """Where a pair's models are on this machine; `drafts` by the names that they go by."""

    target: Path
    drafts: Mapping[str, Path]


def fetch(pair: Pair, *, speculation: bool = True, tell: Tell | None = None) -> Folders:
    """Find a pair's folders, and download what is not on this machine yet.

    Args:
        speculation: False leaves the draft where it is.
        tell: called with why a draft is left out; None leaves none out, and raises.

    Raises:
        LoadError: a folder or repository is missing or not complete.
    """
    target, drafts = _folder(pair.target, pair), {}
    for name, location in named(pair).items() if speculation else ():
        folder = unless_left_out(partial(_folder, location, pair), tell)
        if folder is not None:
            drafts[name] = folder
    return Folders(target, drafts)


def named(pair: Pair) -> dict[str, str]:
    """The locations of a pair's draft models, by short names; one alone is the model."""
    locations = [location for location in pair.models if location not in plugins.installed()]
    if len(locations) == 1:
        return {MODEL: locations[0]}
    names = [Path(location).name for location in locations]
    return {
        name if names.count(name) == 1 else location: location
        for name, location in zip(names, locations, strict=True)
    }


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


def _folder(location: str, pair: Pair) -> Path:
    inside = package_folder(location)
    folder = inside or _expanded(location)
    if not folder.exists() and not inside and _is_repository(location):
        with _hub_errors(location, pair):
            folder = Path(snapshot_download(location, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    _require_complete(folder)
    return folder


def _expanded(location: str) -> Path:
    try:
        return Path(location).expanduser()
    except RuntimeError:  # there is no home of that name, and so no such folder
        return Path(location)


def _is_repository(location: str) -> bool:
    return not location.startswith(("/", ".", "~")) and location.count("/") == 1


@contextmanager
def _hub_errors(repository: str, pair: Pair) -> Iterator[None]:
    """Say in words what kept a repository from being downloaded."""
    what = f"{repository} (of the pair {pair.name})"
    try:
        yield
    except GatedRepoError as error:
        raise LoadError(
            f"{what} asks for its licence to be accepted.",
            hint=f"Accept it at https://huggingface.co/{repository}, then run `hf auth login`.",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise LoadError(
            f"There is no model {what} on the hub, or it is private.",
            hint="Check the name; for a private one run `hf auth login`.",
        ) from error
    except LocalEntryNotFoundError as error:
        raise LoadError(
            f"{what} is not on this machine, and the hub cannot be reached.",
            hint=f"Connect to the network once and run `hf download {repository}`.",
        ) from error
    except Exception as error:  # the HTTP client's own errors have no base in huggingface_hub
        raise LoadError(
            f"{what} could not be downloaded: {in_one_line(error)}",
            hint="Try again; what was downloaded is kept.",
        ) from error


def _require_complete(folder: Path) -> None:
    if not folder.is_dir():
        raise LoadError(
            f"There is no model folder {folder}.",
            hint="Give a folder with a config.json, or a repository such as org/name.",
        )
    _json(folder / "config.json")
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise _incomplete(folder / "tokenizer.json")
    index = folder / "model.safetensors.index.json"
    for shard in sorted(_shards(index)) if index.exists() else ():
        if not (folder / shard).exists():
            raise _incomplete(folder / shard)
    if not any(folder.glob("model*.safetensors")):
        raise _incomplete(folder / "model.safetensors")


def _shards(index: Path) -> set[str]:
    weights = _json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise damaged(index, ValueError("it has no weight_map"))
    return set(weights.values())


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _incomplete(path) from error
    except OSError as error:
        raise LoadError(
            f"{path} cannot be read: {error.strerror}.", hint="It must be a file of your own."
        ) from error
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, ValueError("it is not an object"))
    return content


def _incomplete(path: Path) -> LoadError:
    return LoadError(
        f"The model folder {path.parent} has no {path.name}.",
        hint="Copy or download the model again; it may be half-written.",
    )


def damaged(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"{path} is damaged: {in_one_line(error)}.", hint="Copy or download the model again."
    )


def in_one_line(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" …").rstrip(".") or type(error).__name__


def first_unreadable(folder: Path) -> Path:
    """The first file of weights whose header does not fit its size."""
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            try:
                entries = json.loads(file.read(min(header, size)))
                ends = [v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError):
                return path
        if 8 + header + max(ends, default=0) != size:
            return path
    return files[0]
