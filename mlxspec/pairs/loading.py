"""From folders of models to an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import maybe_set_recommended_wired_limit
from mlx_lm.utils import load_model

from mlxspec.control.records import Setting
from mlxspec.decode.engine import Engine
from mlxspec.defaults import DEFAULT_PAIR
from mlxspec.device import machine
from mlxspec.drafters import plugins
from mlxspec.drafters.graph import Head
from mlxspec.drafters.history import History
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.drafters.vocabulary import ENOUGH, Shared, shared_tokens
from mlxspec.errors import LoadError, UnsupportedModel, VocabularyMismatch
from mlxspec.metrics import Tell
from mlxspec.models.caches.original import Model
from mlxspec.pairs.folders import (
    Folders,
    damaged,
    fetch,
    first_unreadable,
    in_one_line,
    named,
    unless_left_out,
)
from mlxspec.pairs.table import Pair, find_pair
from mlxspec.pairs.tokenizer_files import load_tokenizer
from mlxspec.params import KVQuantization
from mlxspec.tokens import Tokenizer


def load(
    pair: str | Pair = DEFAULT_PAIR,
    *,
    models: Path | None = None,
    speculation: bool = True,
    compiled: bool | None = None,
    kv: KVQuantization | None = None,
    folders: Folders | None = None,
    tell: Tell | None = None,
) -> Engine:
    """Load a pair's models and tokenizer.

    Args:
        pair: a name in the table of pairs, or a pair.
        models: a table laid over the shipped one, in place of the user's own.
        speculation: False leaves the draft unloaded.
        compiled, kv: see `Engine`.
        folders: the result of `fetch`, where that was called before.
        tell: called with why a draft that cannot be used is left out; None leaves none out, and
            raises.

    Raises:
        UnknownPair, TableError: the table has no such pair, or is not valid.
        LoadError: a folder or repository is missing, damaged or of an unsupported type.
        VocabularyMismatch: the draft has too few of the target's tokens.
    """
    started = time.perf_counter()
    if isinstance(pair, str):
        pair = find_pair(pair, models)
    folders = folders or fetch(pair, speculation=speculation, tell=tell)
    maybe_set_recommended_wired_limit()
    target, config = _model(folders.target)
    tokenizer = _tokenizer(folders.target, config.get("eos_token_id"))

    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "draft_tokens": pair.draft_tokens,
        "compiled": compiled,
        "kv": kv,
    }
    found = _drafters_of(pair, folders, target, tokenizer, tell) if speculation else _Drafters()
    engine = _engine(pair, target, found, options, tell)
    engine.load_s = time.perf_counter() - started
    return engine


def _engine(
    pair: Pair, target: Model, found: _Drafters, options: dict[str, Any], tell: Tell | None
) -> Engine:
    """An engine with all that drafts; or with less, where that may be left out."""

    def with_(drafters: _Drafters) -> Engine:
        return Engine(
            target,
            drafters.drafts,
            shared=drafters.shared,
            texts=drafters.texts,
            heads=drafters.heads,
            **options,
        )

    engine = None
    if found.drafts or found.heads:
        engine = unless_left_out(lambda: with_(found), tell)
    try:
        return engine or with_(_Drafters(texts=found.texts))
    except UnsupportedModel as error:
        if pair.drafts:
            raise
        if tell is not None:
            tell(f"no speculation: {error.message}")
        return with_(_Drafters())


@dataclass
class _Drafters:
    """What drafts for a target: models, with the tokens that they share, and others."""

    drafts: dict[str, Model] = field(default_factory=dict)
    shared: dict[str, Shared] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    texts: list[Callable[[], TextDrafter]] = field(default_factory=list)


def _drafters_of(
    pair: Pair, folders: Folders, target: Model, tokenizer: Tokenizer, tell: Tell | None
) -> _Drafters:
    found = _Drafters()
    for name in folders.drafts:
        loaded = unless_left_out(partial(_draft, name, folders, tokenizer, pair), tell)
        if loaded is not None:
            found.drafts[name], shared = loaded
            found.shared |= {} if shared is None else {name: shared}
    for name in pair.models:
        if name in plugins.installed():
            made = unless_left_out(partial(plugins.made, name, target, tokenizer), tell)
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
            f"The draft speaks too few of the target's tokens: {named(pair)[name]} shares "
            f"{shared.percent}% of those of {pair.target}; it takes {ENOUGH:.0%}.",
            hint="Choose a draft of the target's family, or --draft history, which needs no model.",
        )
    return _model(folder)[0], shared


def setting_of(pair: Pair, engine: Engine) -> Setting:
    """What holds for what is learned with an engine that was loaded from `pair`."""
    models = [engine.target, *engine.drafts.values()]
    complete = len(engine.drafts) == len(named(pair))
    kv = f", keys and values {engine.kv.bits}" if engine.kv else ""
    return Setting(
        target=pair.target,
        draft=pair.draft_name if complete else " + ".join(engine.drafts) or None,
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


def _model(folder: Path) -> tuple[Model, dict[str, Any]]:
    """The model and its configuration, completed by generation_config.json."""
    try:
        model, config = load_model(folder)
    except KeyError as error:
        raise LoadError(
            f"{folder / 'config.json'} has no {error}.", hint="Use a model that mlx-lm can run."
        ) from error
    except RuntimeError as error:
        raise damaged(first_unreadable(folder), error) from error
    except Exception as error:
        # A model type, a configuration or weights that mlx-lm cannot use: its models raise whatever
        # they come across.
        raise LoadError(
            f"mlx-lm cannot load {folder}: {in_one_line(error)}.",
            hint="Check config.json and the weights, or use a model that mlx-lm can run.",
        ) from error
    return model, config


def _tokenizer(folder: Path, ends: list[int] | int | None = None) -> Tokenizer:
    try:
        return load_tokenizer(folder, eos_token_ids=ends)
    except LoadError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise LoadError(
            f"The tokenizer in {folder} cannot be loaded: {in_one_line(error)}.",
            hint="Copy or download the model again.",
        ) from error


def _shared(target: Tokenizer, target_folder: Path, draft_folder: Path) -> Shared | None:
    """What a draft whose ids mean other tokens shares; padding to another size is no difference."""
    files = [folder / "tokenizer.json" for folder in (target_folder, draft_folder)]
    if all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    return shared_tokens(target, _tokenizer(draft_folder))
