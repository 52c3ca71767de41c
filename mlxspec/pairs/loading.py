"""From folders of models to an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxspec.control.records import Setting
from mlxspec.decode.engine import Engine
from mlxspec.defaults import DEFAULT_PAIR, MODEL, MTP
from mlxspec.device import machine
from mlxspec.device.memory import wire
from mlxspec.drafters import plugins
from mlxspec.drafters.heads.head import Head
from mlxspec.drafters.history import History
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.drafters.vocabulary import ENOUGH, Shared, shared_tokens
from mlxspec.errors import UnsupportedModel, VocabularyMismatch
from mlxspec.metrics import Tell
from mlxspec.models.caches.original import Model
from mlxspec.models.context import context_of
from mlxspec.models.layout import lay_out
from mlxspec.pairs import adapters
from mlxspec.pairs.folders import Folders, adapter_folder, fetch, named, unless_left_out
from mlxspec.pairs.heads import kind_in, load_head
from mlxspec.pairs.models import Loaded, load_folder
from mlxspec.pairs.recommended import recommended
from mlxspec.pairs.table import Pair, find_pair
from mlxspec.pairs.tokenizer_files import load_folder_tokenizer
from mlxspec.params import KVQuantization
from mlxspec.tokens import Tokenizer


def load(
    pair: str | Pair = DEFAULT_PAIR,
    *,
    models: Path | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    speculation: bool = True,
    compiled: bool | None = None,
    kv: KVQuantization | None = None,
    wired: bool = False,
    folders: Folders | None = None,
    tell: Tell | None = None,
    doing: Tell | None = None,
) -> Engine:
    """Load a pair's models and tokenizer.

    Args:
        pair: a name in the table of pairs, or a pair.
        models: a table laid over the shipped one, in place of the user's own.
        adapter: a folder or repository of LoRA weights for the target, in place of the pair's own.
        revision: the target's branch, tag or commit on the hub, in place of the pair's own.
        trust_remote_code: run code that a model or a tokenizer brings; False runs it only where
            the pair says so.
        speculation: False leaves the draft unloaded.
        compiled, kv: see `Engine`.
        wired: keep the models' memory from being paged out, on Metal: as much as they need and
            a little more, until the process ends.
        folders: the result of `fetch`, where that was called before.
        tell: called with why a draft that cannot be used is left out; None leaves none out, and
            raises.
        doing: called with what is done from now on, in words.

    Raises:
        UnknownPair, TableError: the table has no such pair, or is not valid.
        LoadError: a folder or repository is missing, damaged or of an unsupported type.
        VocabularyMismatch: the draft has too few of the target's tokens.
    """
    started = time.perf_counter()
    pair = _pair(pair, models, adapter, revision)
    trust = trust_remote_code or pair.trust_remote_code
    folders = folders or fetch(pair, speculation=speculation, tell=tell)
    loaded, tokenizer = _target(pair, folders, trust)
    target = loaded.model

    options: dict[str, Any] = {"draft_tokens": pair.draft_tokens, "compiled": compiled, "kv": kv}
    options |= {"tokenizer": tokenizer, "context": _context(pair, target, loaded)}
    found = _Drafters()
    if speculation:
        found = _drafters_of(pair, folders, target, tokenizer, tell, trust)
    if doing is not None:
        doing("trying the caches of its models")  # their first passes, which also read the weights
    engine = _engine(pair, target, found, options, tell)
    engine.notes = loaded.notes
    if wired:
        wire(sum(map(bytes_of, (engine.target, *engine.drafts.values(), *_heads_of(engine)))))
    engine.recommended = {**recommended(folders.target), **pair.sampling}
    engine.load_s = time.perf_counter() - started
    return engine


def _pair(
    pair: str | Pair, models: Path | None, adapter: str | Path | None, revision: str | None
) -> Pair:
    """A pair with the adapter and the revision of a call in place of its own."""
    if isinstance(pair, str):
        pair = find_pair(pair, models)
    return replace(
        pair,
        adapter=pair.adapter if adapter is None else str(adapter),
        revision=pair.revision if revision is None else revision,
    )


def _target(pair: Pair, folders: Folders, trust: bool) -> tuple[Loaded, Tokenizer]:
    """The target with its adapter, and its tokenizer."""
    loaded = load_folder(folders.target, trust_remote_code=trust)
    model = loaded.model
    applied = folders.adapter or adapter_folder(pair)
    if applied is not None:
        model = adapters.applied(model, applied)
    lay_out(model)
    tokenizer = load_folder_tokenizer(
        folders.target, loaded.config.get("eos_token_id"), trust_remote_code=trust
    )
    notes = (*loaded.notes, *adapters.note_beside(folders.target, applied))
    return replace(loaded, model=model, notes=notes), tokenizer


def _context(pair: Pair, target: Model, loaded: Loaded) -> int | None:
    """The tokens that a text may have: what the target can read, or less where the pair says so."""
    lengths = (context_of(target, loaded.config), pair.context)
    return min((length for length in lengths if length is not None), default=None)


def _engine(
    pair: Pair, target: Model, found: _Drafters, options: dict[str, Any], tell: Tell | None
) -> Engine:
    """An engine with all that drafts; or with less, where that may be left out."""

    def with_(drafters: _Drafters) -> Engine:
        return Engine(
            target,
            drafters.drafts,
            shared=drafters.shared,
            draft_contexts=drafters.contexts,
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
    """The drafters for a target: models, with what is known of them by name, and others."""

    drafts: dict[str, Model] = field(default_factory=dict)
    shared: dict[str, Shared] = field(default_factory=dict)
    contexts: dict[str, int | None] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    texts: list[Callable[[], TextDrafter]] = field(default_factory=list)


def _drafters_of(
    pair: Pair,
    folders: Folders,
    target: Model,
    tokenizer: Tokenizer,
    tell: Tell | None,
    trust: bool,
) -> _Drafters:
    found = _Drafters()
    for name, folder in folders.drafts.items():
        kind = unless_left_out(partial(kind_in, folder, folders.target), tell)
        if kind is not None:
            head = unless_left_out(partial(load_head, kind, folder, target, pair.draft_bits), tell)
            if head is not None:
                found.heads[kind if name == MODEL else name] = head
            continue
        loaded = unless_left_out(partial(_draft, name, folders, tokenizer, pair, trust), tell)
        if loaded is not None:
            draft, shared = loaded
            found.drafts[name] = draft.model
            found.contexts[name] = context_of(draft.model, draft.config)
            found.shared |= {} if shared is None else {name: shared}
    if MTP in pair.drafts:
        head = unless_left_out(
            partial(load_head, "mtp", folders.target, target, pair.draft_bits), tell
        )
        found.heads |= {} if head is None else {MTP: head}
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
    name: str, folders: Folders, tokenizer: Tokenizer, pair: Pair, trust: bool
) -> tuple[Loaded, Shared | None]:
    folder = folders.drafts[name]
    shared = shared_of(tokenizer, folders.target, folder, trust)
    if shared is not None and shared.overlap < ENOUGH:
        raise VocabularyMismatch(
            f"The draft speaks too few of the target's tokens: {named(pair)[name]} shares "
            f"{shared.percent}% of those of {pair.target}; it takes {ENOUGH:.0%}.",
            hint="Choose a draft of the target's family, or --draft history, which needs no model.",
        )
    loaded = load_folder(folder, trust_remote_code=trust)
    lay_out(loaded.model)
    return loaded, shared


def setting_of(pair: Pair, engine: Engine) -> Setting:
    """The setting under which an engine that was loaded from `pair` learns."""
    drafts = {**engine.drafts, **engine.heads}
    models = [engine.target, *engine.drafts.values(), *_heads_of(engine)]
    complete = len(models) - 1 == len(named(pair)) + (MTP in pair.drafts)
    kv = f", keys and values {engine.kv.bits}" if engine.kv else ""
    return Setting(
        target=pair.target_name,
        draft=pair.draft_name if complete else " + ".join(drafts) or None,
        quantisation=" and ".join(map(_bits_of, models)) + kv,
        chip=machine.chip(),
        backend=machine.backend(),
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
    )


def _heads_of(engine: Engine) -> list[Model]:
    """The weights of the trained heads."""
    return [head.module for head in engine.heads.values() if hasattr(head, "module")]


def bytes_of(model: Model) -> int:
    """Bytes of its weights."""
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return sum(array.nbytes for array in arrays.values())


def _bits_of(model: Model) -> str:
    """How many bits its weights have, or their type where none is quantised."""
    bits = sorted({module.bits for module in model.modules() if hasattr(module, "bits")})
    if bits:
        return " + ".join(map(str, bits)) + " bits"
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return str(next(iter(arrays.values())).dtype).rpartition(".")[2]


def shared_of(
    target: Tokenizer, target_folder: Path, draft_folder: Path, trust: bool
) -> Shared | None:
    """The tokens that a draft of other ids shares; None where the ids mean the same."""
    files = [folder / "tokenizer.json" for folder in (target_folder, draft_folder)]
    if all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return None
    return shared_tokens(target, load_folder_tokenizer(draft_folder, trust_remote_code=trust))
