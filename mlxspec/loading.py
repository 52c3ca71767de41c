"""From the names of models to an engine: folders, repositories, and what can be wrong with them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

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

from mlxspec import machine
from mlxspec.caches.original import Model
from mlxspec.engine import Engine
from mlxspec.errors import LoadError, OutOfMemory, UnsupportedModel, VocabularyMismatch
from mlxspec.history import History
from mlxspec.memory import watched
from mlxspec.pairs import DEFAULT_PAIR, Pair, find_pair, package_folder
from mlxspec.params import KVQuantization
from mlxspec.text import Tokenizer
from mlxspec.tuning import Setting
from mlxspec.vocabulary import ENOUGH, Shared, shared_tokens

T = TypeVar("T")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json")


# Called with why a draft is left out.
LeaveOut = Callable[[str], None]


@dataclass(frozen=True)
class Folders:
    """Where a pair's models are on this machine; `draft` is None where nothing drafts."""

    target: Path
    draft: Path | None


def fetch(pair: Pair, *, speculation: bool = True, leave_out: LeaveOut | None = None) -> Folders:
    """Find a pair's folders, and download what is not on this machine yet.

    Args:
        speculation: False leaves the draft where it is.
        leave_out: go on without a draft that is not to be had, and say why; None raises.

    Raises:
        LoadError: a folder or repository is missing or not complete.
    """
    draft = None
    target = _folder(pair.target, pair)
    if pair.models and speculation:
        location = pair.models[0]
        draft = _unless_left_out(lambda: _folder(location, pair), leave_out)
    return Folders(target, draft)


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

    def engine_with(draft_folder: Path | None, *, speculates: bool = speculation) -> Engine:
        draft = shared = None
        if draft_folder is not None:
            shared = _shared(tokenizer, folders.target, draft_folder, pair)
            draft, _ = _model(draft_folder)
        return Engine(
            target,
            draft,
            tokenizer,
            shared=shared,
            texts=(History,) if speculates else (),
            draft_tokens=pair.draft_tokens,
            compiled=compiled,
            kv=kv,
        )

    engine = None
    if folders.draft is not None:
        engine = _unless_left_out(lambda: engine_with(folders.draft), leave_out)
    try:
        engine = engine or engine_with(None)
    except UnsupportedModel as error:
        if pair.drafts:
            raise
        if leave_out is not None:
            leave_out(f"no speculation: {error.message}")
        engine = engine_with(None, speculates=False)
    engine.load_s = time.perf_counter() - started
    return engine


def setting_of(pair: Pair, engine: Engine) -> Setting:
    """What holds for what is learned with an engine that was loaded from `pair`."""
    models = [model for model in (engine.target, engine.draft) if model is not None]
    kv = f", keys and values {engine.kv.bits}" if engine.kv else ""
    return Setting(
        target=pair.target,
        draft=pair.drafting if engine.draft is not None else None,
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


def _shared(
    target: Tokenizer, target_folder: Path, draft_folder: Path, pair: Pair
) -> Shared | None:
    """What a draft whose ids mean other tokens shares; padding to another size is no difference."""
    files = [folder / "tokenizer.json" for folder in (target_folder, draft_folder)]
    if all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    shared = shared_tokens(target, _tokenizer(draft_folder))
    if shared is not None and shared.overlap < ENOUGH:
        raise VocabularyMismatch(
            f"The draft speaks too few of the target's tokens: {pair.draft} shares "
            f"{shared.percent}% of those of {pair.target}; it takes {ENOUGH:.0%}.",
            hint="Choose a draft of the target's family, or --draft history, which needs no model.",
        )
    return shared
