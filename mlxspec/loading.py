"""From the names of models to an engine: folders, repositories, and what can be wrong with them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar, cast

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_set_recommended_wired_limit
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, load_model, load_tokenizer

from mlxspec import machine, plugins
from mlxspec.caches.original import Model
from mlxspec.drafters import MODEL, Head
from mlxspec.engine import Engine
from mlxspec.errors import LoadError, OutOfMemory, UnsupportedModel, VocabularyMismatch
from mlxspec.history import History
from mlxspec.memory import watched
from mlxspec.pairs import DEFAULT_PAIR, Pair, find_pair, package_folder
from mlxspec.params import KVQuantization
from mlxspec.proposals import TextDrafter
from mlxspec.text import Tokenizer
from mlxspec.tuning import Setting
from mlxspec.vocabulary import ENOUGH, Shared, shared_tokens

T = TypeVar("T")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


# Called with why a draft is left out.
LeaveOut = Callable[[str], None]


@dataclass(frozen=True)
class Folders:
    """Where a pair's models are on this machine; `drafts` by the names that they go by."""

    target: Path
    drafts: Mapping[str, Path]


def fetch(pair: Pair, *, speculation: bool = True, leave_out: LeaveOut | None = None) -> Folders:
    """Find a pair's folders, and download what is not on this machine yet.

    Args:
        speculation: False leaves the draft where it is.
        leave_out: go on without a draft that is not to be had, and say why; None raises.

    Raises:
        LoadError: a folder or repository is missing or not complete.
    """
    target, drafts = _folder(pair.target, pair), {}
    for name, location in _named(pair).items() if speculation else ():
        folder = _unless_left_out(partial(_folder, location, pair), leave_out)
        if folder is not None:
            drafts[name] = folder
    return Folders(target, drafts)


def _named(pair: Pair) -> dict[str, str]:
    """The locations of a pair's draft models, by short names; one alone is the model."""
    locations = [location for location in pair.models if location not in plugins.installed()]
    if len(locations) == 1:
        return {MODEL: locations[0]}
    names = [Path(location).name for location in locations]
    return {
        name if names.count(name) == 1 else location: location
        for name, location in zip(names, locations, strict=True)
    }


def load(
    pair: str | Pair = DEFAULT_PAIR,
    *,
    models: Path | None = None,
    speculation: bool = True,
    compiled: bool | None = None,
    kv: KVQuantization | None = None,
    folders: Folders | None = None,
    leave_out: LeaveOut | None = None,
) -> Engine:
    """Load a pair's models and tokenizer.

    Args:
        pair: a name in the table of pairs, or a pair.
        models: a table laid over the shipped one, in place of the user's own.
        speculation: False leaves the draft unloaded.
        compiled, kv: see `Engine`.
        folders: what `fetch` returned, where that was called before.
        leave_out: go on without a draft that cannot be used, and say why; None raises.

    Raises:
        UnknownPair, TableError: the table has no such pair, or is not valid.
        LoadError: a folder or repository is missing, damaged or of an unsupported type.
        VocabularyMismatch: the draft has too few of the target's tokens.
    """
    started = time.perf_counter()
    if isinstance(pair, str):
        pair = find_pair(pair, models)
    folders = folders or fetch(pair, speculation=speculation, leave_out=leave_out)
    maybe_set_recommended_wired_limit()
    target, config = _model(folders.target)
    tokenizer = _tokenizer(folders.target, config.get("eos_token_id"))

    def engine_with(found: _Drafting) -> Engine:
        return Engine(
            target,
            found.drafts,
            tokenizer,
            shared=found.shared,
            texts=found.texts,
            heads=found.heads,
            draft_tokens=pair.draft_tokens,
            compiled=compiled,
            kv=kv,
        )

    found = _Drafting()
    if speculation:
        found = _drafting(pair, folders, target, tokenizer, leave_out)
    engine = None
    if found.drafts or found.heads:
        engine = _unless_left_out(lambda: engine_with(found), leave_out)
    try:
        engine = engine or engine_with(_Drafting(texts=found.texts))
    except UnsupportedModel as error:
        if pair.drafts:
            raise
        if leave_out is not None:
            leave_out(f"no speculation: {error.message}")
        engine = engine_with(_Drafting())
    engine.load_s = time.perf_counter() - started
    return engine


@dataclass
class _Drafting:
    """What drafts for a target: models, with the tokens that they share, and others."""

    drafts: dict[str, Model] = field(default_factory=dict)
    shared: dict[str, Shared] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    texts: list[Callable[[], TextDrafter]] = field(default_factory=list)


def _drafting(
    pair: Pair, folders: Folders, target: Model, tokenizer: Tokenizer, leave_out: LeaveOut | None
) -> _Drafting:
    found = _Drafting()
    for name in folders.drafts:
        loaded = _unless_left_out(partial(_draft, name, folders, tokenizer, pair), leave_out)
        if loaded is not None:
            found.drafts[name], shared = loaded
            found.shared |= {} if shared is None else {name: shared}
    for name in pair.models:
        if name in plugins.installed():
            made = _unless_left_out(partial(plugins.made, name, target, tokenizer), leave_out)
            if plugins.is_head(made):
                found.heads[name] = cast(Head, made)
            elif made is not None:
                found.texts.append(cast(Callable[[], TextDrafter], made))
    found.texts.append(History)
    return found


def _draft(
    name: str, folders: Folders, tokenizer: Tokenizer, pair: Pair
) -> tuple[Model, Shared | None]:
    folder = folders.drafts[name]
    shared = _shared(tokenizer, folders.target, folder)
    if shared is not None and shared.overlap < ENOUGH:
        raise VocabularyMismatch(
            f"The draft speaks too few of the target's tokens: {_named(pair)[name]} shares "
            f"{shared.percent}% of those of {pair.target}; it takes {ENOUGH:.0%}.",
            hint="Choose a draft of the target's family, or --draft history, which needs no model.",
        )
    return _model(folder)[0], shared


def setting_of(pair: Pair, engine: Engine) -> Setting:
    """What holds for what is learned with an engine that was loaded from `pair`."""
    models = [engine.target, *engine.drafts.values()]
    complete = len(engine.drafts) == len(_named(pair))
    kv = f", keys and values {engine.kv.bits}" if engine.kv else ""
    return Setting(
        target=pair.target,
        draft=pair.drafting if complete else " + ".join(engine.drafts) or None,
        quantisation=" and ".join(map(_bits_of, models)) + kv,
        chip=machine.chip(),
        backend=machine.backend(),
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
    )


def _bits_of(model: Model) -> str:
    """How many bits its weights have, or their type where none is quantised."""
    bits = sorted({module.bits for module in model.modules() if hasattr(module, "bits")})
    if bits:
        return " + ".join(map(str, bits)) + " bits"
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return str(next(iter(arrays.values())).dtype).rpartition(".")[2]


def _unless_left_out(step: Callable[[], T], leave_out: LeaveOut | None) -> T | None:
    """What `step` returns; None where it cannot be done and may be left out."""
    try:
        with watched("loading the draft"):
            return step()
    except (LoadError, VocabularyMismatch, OutOfMemory) as error:
        if leave_out is None:
            raise
        leave_out(f"no speculation: {error.message}")
        return None


# --- where a model is -------------------------------------------------------------------


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
            f"{what} could not be downloaded: {_in_one_line(error)}",
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
        raise _damaged(index, ValueError("it has no weight_map"))
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
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, ValueError("it is not an object"))
    return content


def _incomplete(path: Path) -> LoadError:
    return LoadError(
        f"The model folder {path.parent} has no {path.name}.",
        hint="Copy or download the model again; it may be half-written.",
    )


def _damaged(path: Path, error: Exception) -> LoadError:
    return LoadError(
        f"{path} is damaged: {_in_one_line(error)}.", hint="Copy or download the model again."
    )


def _in_one_line(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" …").rstrip(".") or type(error).__name__


# --- what is in it ----------------------------------------------------------------------


def _model(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The model and its configuration, completed by generation_config.json."""
    try:
        model, config = load_model(folder)
    except KeyError as error:
        raise LoadError(
            f"{folder / 'config.json'} has no {error}.", hint="Use a model that mlx-lm can run."
        ) from error
    except RuntimeError as error:
        raise _damaged(_first_unreadable(folder), error) from error
    except Exception as error:
        # A model type, a configuration or weights that mlx-lm cannot use: its models raise whatever
        # they come across.
        raise LoadError(
            f"mlx-lm cannot load {folder}: {_in_one_line(error)}.",
            hint="Check config.json and the weights, or use a model that mlx-lm can run.",
        ) from error
    return model, config


def _first_unreadable(folder: Path) -> Path:
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


def _tokenizer(folder: Path, ends: list[int] | int | None = None) -> Tokenizer:
    try:
        return load_tokenizer(folder, eos_token_ids=ends)
    except Exception as error:  # tokenizers raises Exception itself
        raise LoadError(
            f"The tokenizer in {folder} cannot be loaded: {_in_one_line(error)}.",
            hint="Copy or download the model again.",
        ) from error


def _shared(target: Tokenizer, target_folder: Path, draft_folder: Path) -> Shared | None:
    """What a draft whose ids mean other tokens shares; padding to another size is no difference."""
    files = [folder / "tokenizer.json" for folder in (target_folder, draft_folder)]
    if all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    return shared_tokens(target, _tokenizer(draft_folder))
