"""Whether a target and a draft belong together: tokens, ends of text, caches, memory.

Sizes of vocabularies decide nothing: they are padded, and what tokens mean is in neither of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mlxspec.drafters.heads.block_config import BlockConfig
from mlxspec.drafters.heads.mtp import MOST
from mlxspec.drafters.vocabulary import ENOUGH
from mlxspec.errors import LoadError, MlxspecError
from mlxspec.pairs import mtp
from mlxspec.pairs.contents import TOKENIZER_FILES
from mlxspec.pairs.folders import draft_files
from mlxspec.pairs.hub import MODEL_FILES, Repository, download
from mlxspec.pairs.loading import shared_of
from mlxspec.pairs.memory import IN_WORDS, MemorySum
from mlxspec.pairs.pull import gigabytes, plan
from mlxspec.pairs.stock import TARGET, Held, footprint_of, memory_of, stock, weights_in
from mlxspec.pairs.table import Pair
from mlxspec.pairs.tokenizer_files import load_folder_tokenizer
from mlxspec.templates import source_of
from mlxspec.tokens import Tokenizer

Mark = Literal["✓", "!", "✗"]

# What tells about a model without its weights.
PREVIEW = ("*.json", "*.jinja", *TOKENIZER_FILES, "*.txt")
_LISTED = 4  # names of tokens in one line
_LARGE = 0.4  # of the target: a draft of that size takes too much of a round
_THINKING = ("<think>", "enable_thinking", "<|channel|>", "reasoning_effort", "[THINK]")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Finding:
    """One line of a check: ✓ fits, ! is to be known, ✗ keeps the pair from being used."""

    mark: Mark
    what: str
    words: str


@dataclass(frozen=True)
class Check:
    """What a check found, and the memory where that is known."""

    pair: Pair
    findings: tuple[Finding, ...]
    memory: MemorySum | None

    @property
    def is_usable(self) -> bool:
        return all(one.mark != "✗" for one in self.findings)

    @property
    def verdict(self) -> str:
        if not self.is_usable:
            return "these cannot be used together here"
        if any(one.mark == "!" for one in self.findings):
            return "these can be used together; mind the lines with !"
        return "these fit together"

    def as_dict(self) -> dict[str, Any]:
        return {
            "pair": self.pair.name,
            "usable": self.is_usable,
            "verdict": self.verdict,
            "findings": [vars(one) for one in self.findings],
            "memory": None if self.memory is None else self.memory.as_dict(),
        }


def check(pair: Pair, *, context: int | None = None) -> Check:
    """Check a pair by its configurations and tokenizers, which are fetched where they are not here.

    Raises:
        LoadError: the target's are not to be had.
    """
    models, weights = _fetched(pair)
    findings: list[Finding] = []
    target = models[0]
    tokenizer = _tokenizer(target)
    findings += _of_template(tokenizer)
    for one in models[1:]:
        findings += _guarded(one.role, partial(_of_draft, one, target, tokenizer))
    for one in models:
        findings += _guarded(one.role, partial(_of_caches, one))
    findings += _of_sizes(models, weights)
    memory = None
    try:
        memory = memory_of(pair, models, weights=weights, context=context)
    except MlxspecError as error:
        findings.append(Finding("!", "memory", error.message))
    else:
        findings.append(_of_memory(memory))
    return Check(pair, tuple(findings), memory)


def _guarded(role: str, found: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Findings about a model, or the reason why it cannot be used."""
    try:
        return list(found())
    except MlxspecError as error:
        return [Finding("✗", role, error.message)]


def _fetched(pair: Pair) -> tuple[list[Held], dict[str, int]]:
    """A pair's models with their configurations, and the bytes of their weights by role."""
    weights: dict[str, int] = {}
    target: Path | None = None  # which is the first of them
    for one in stock(pair):
        folder = one.folder
        if one.state == "here" and folder is not None:
            weights[one.role] = weights_in(one)
        elif isinstance(at := one.repository, Repository):
            folder = download(at, pair.name, PREVIEW)
            patterns = MODEL_FILES if target is None else draft_files(at, pair, target)
            files = plan(at, pair.name, patterns).files
            weights[one.role] = sum(f.size for f in files if f.path.endswith(".safetensors"))
        target = target or folder
    return stock(pair), weights


def _tokenizer(one: Held) -> Tokenizer:
    if one.folder is None:
        raise LoadError(
            f"{one.location} is not on this machine, and could not be fetched.",
            hint="Check the name, or the network.",
        )
    return load_folder_tokenizer(one.folder, one.config().get("eos_token_id"))


def _of_template(tokenizer: Tokenizer) -> Iterator[Finding]:
    source = source_of(tokenizer)
    if not source and not tokenizer.has_chat_template:
        yield Finding("!", "template", "the target has no chat template: prompts are read raw")
        return
    thinks = any(word in source for word in _THINKING)
    kind = "reasons before it answers, or can" if thinks else "answers without reasoning"
    yield Finding("✓", "template", f"the target's alone is used; it {kind}")


def _of_draft(one: Held, target: Held, tokenizer: Tokenizer) -> Iterator[Finding]:
    if one.head == "mtp":
        yield from _of_layer(one, target)
    elif one.head is not None:
        yield from _of_head(one, target)
    else:
        yield from _of_tokens(one, target, tokenizer)


def _of_tokens(one: Held, target: Held, tokenizer: Tokenizer) -> Iterator[Finding]:
    """The tokens of a draft beside the target's."""
    draft = _tokenizer(one)
    assert target.folder is not None
    assert one.folder is not None
    shared = shared_of(tokenizer, target.folder, one.folder, False)
    if shared is None:
        yield Finding("✓", one.role, "its ids mean the same tokens as the target's")
    elif shared.overlap >= ENOUGH:
        words = f"its ids mean other tokens, {shared.percent}% of them shared: they are translated"
        yield Finding("!", one.role, words)
    else:
        words = f"it shares {shared.percent}% of the target's tokens; it takes {ENOUGH:.0%}"
        yield Finding("✗", one.role, words)
    lacking = sorted(tokenizer.get_added_vocab().keys() - draft.get_added_vocab().keys())
    lacking = [name for name in lacking if name not in draft.get_vocab()]
    if lacking:
        words = f"it lacks added tokens of the target, and cannot propose them: {_some(lacking)}"
        yield Finding("!", one.role, words)
    yield from _of_ends(one, tokenizer, draft)
    mine, theirs = (_thinks(each) for each in (tokenizer, draft))
    if mine and not theirs:
        words = "it was not trained to reason: reasoning may be accepted less often"
        yield Finding("!", one.role, words)


def _of_layer(one: Held, target: Held) -> Iterator[Finding]:
    """An MTP layer beside the target that it is trained with."""
    mtp.require_of(one.config(), target.config(), one.location)
    if one.folder is not None and not (mtp.files_of(one.folder) or mtp.tensors_of(one.folder)):
        raise mtp.no_layer(one.location)
    yield Finding("✓", one.role, f"the target's MTP layer: proposes up to {MOST} tokens")


def _of_head(one: Held, target: Held) -> Iterator[Finding]:
    """A trained head beside the target that it reads."""
    read = BlockConfig.read(one.config(), one.location)
    config = target.config()
    own = {**config, **mtp.text_of(config)}
    sizes = (
        ("hidden size", read.target_hidden_size, own.get("hidden_size")),
        ("number of layers", read.target_layers, own.get("num_hidden_layers")),
        ("vocabulary", read.vocabulary, own.get("vocab_size")),
    )
    for what, its, targets in sizes:
        if its is not None and targets is not None and its != targets:
            words = f"it is for another target: its {what} is {its:,}, this one's {targets:,}"
            yield Finding("✗", one.role, words)
            return
    words = f"a trained head: proposes up to {read.most} tokens in one pass"
    yield Finding("✓", one.role, words)


def _of_ends(one: Held, tokenizer: Tokenizer, draft: Tokenizer) -> Iterator[Finding]:
    """The ends of a text, by the names of their tokens."""
    mine, theirs = (_names(each, each.eos_token_ids) for each in (tokenizer, draft))
    if mine == theirs:
        yield Finding("✓", one.role, f"it ends a text as the target does: {_some(sorted(mine))}")
    elif mine & theirs:
        yield Finding("✓", one.role, f"it shares an end of text: {_some(sorted(mine & theirs))}")
    else:
        words = (
            f"it ends a text with {_some(sorted(theirs))}, the target with {_some(sorted(mine))}"
        )
        yield Finding("!", one.role, words)


def _names(tokenizer: Tokenizer, ids: Iterable[int]) -> set[str]:
    return {str(tokenizer.convert_ids_to_tokens(one)) for one in ids}


def _thinks(tokenizer: Tokenizer) -> bool:
    source = source_of(tokenizer)
    return any(word in source for word in _THINKING)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _of_caches(one: Held) -> Iterator[Finding]:
    found = footprint_of(one, 0)
    kinds = ", ".join(sorted({IN_WORDS[layer.kind] for layer in found.layers}))
    if found.fused:
        yield Finding("✓", one.role, f"caches: {kinds}; taken back exactly, and tried at loading")
    else:
        yield Finding("!", one.role, f"caches: {kinds}; exact, but rounds wait for the host")


def _of_sizes(models: list[Held], weights: Mapping[str, int]) -> Iterator[Finding]:
    target = weights.get(TARGET, 0)
    for one in models[1:]:
        size = weights.get(one.role, 0)
        if target and size > _LARGE * target:
            words = f"it has {size / target:.0%} of the target's bytes: it will hardly pay"
            yield Finding("!", one.role, words)
        elif target and size:
            words = f"it has {size / target:.0%} of the target's bytes"
            yield Finding("✓", one.role, words)
    with suppress(LoadError):
        config = models[0].config()
        parts = [config, *(value for value in config.values() if isinstance(value, dict))]
        if len(models) > 1 and any(part.get(name) for part in parts for name in _EXPERTS):
            words = "a mixture of experts reads few of its weights for a token: a draft may not pay"
            yield Finding("!", TARGET, words)


def _of_memory(memory: MemorySum) -> Finding:
    words = (
        f"{gigabytes(memory.total)} for a text of {memory.context:,} tokens, of "
        f"{gigabytes(memory.limit)} on this machine"
    )
    return Finding("✓" if memory.fits else "✗", "memory", words)
