"""The past of a prompt on disk, for the next run whose prompt begins with the same tokens.

The file holds the tokens that were read and the resulting caches of the target and the drafts,
each with the number of its tokens and the identity of its model. Each model takes what it can use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlxspec.decode import prompt_file
from mlxspec.decode.prompt_file import Damaged, Unusable
from mlxspec.files import require_no_folder
from mlxspec.metrics import TARGET, Tell
from mlxspec.models.cached_model import is_exact
from mlxspec.models.caches.original import fresh_cache
from mlxspec.models.identity import Identity
from mlxspec.models.prefill import CHUNK, Begun, Reading, afresh


class _Stored(NamedTuple):
    """The states of a model's caches after `read` of the file's tokens, from `start` on."""

    name: str
    model: str
    start: int
    read: int
    states: list[Any]


class _Held(NamedTuple):
    """The content of a file: token ids, and the past of each model after some of them."""

    tokens: list[int]
    pasts: dict[str, _Stored]


class _Read(NamedTuple):
    """A reading to be kept: the text from `start` on, `taken` tokens of it from the file."""

    reading: Reading
    start: int
    taken: int
    caches: list[Any]


class PromptCache:
    """A file that a session begins from, and keeps its prompt in.

    Models are known by name: TARGET, and the names of the drafts.

    Args:
        path: of the file, which need not exist.
        identity: of the models that read.
        prompt_tokens: the length of the prompt; a longer text is not kept, being no prompt.

    `taken` holds the number of tokens that each model last took from the file.

    Raises:
        UsageError: the path is that of a folder.
    """

    def __init__(self, path: Path, identity: Identity, *, prompt_tokens: int) -> None:
        require_no_folder(path)
        self.taken: dict[str, int] = {}
        self._path = path
        self._identity = identity
        self._prompt_tokens = prompt_tokens
        self._may_write = True
        self._held: _Held | None = None  # the drafts' part of the file, until they read
        self._read: dict[str, _Read] = {}
        self._told: set[str] = set()

    def begun(self, name: str, reading: Reading, tell: Tell, start: int = 0) -> Begun:
        """The part of a model's tokens that is read already, in new caches at every call.

        Args:
            start: where its tokens begin in the text.
            tell: called with notes on the use of the file.
        """
        tell = self._once(tell)
        if name == TARGET:
            self._may_write = True
            self._held = self._sound(tell) if reading.tokens else None
        begun, held = afresh(reading), self._held
        past = held.pasts.get(name) if held is not None else None
        if held is not None and past is not None and past.start == start:
            if past.model == self._identity.models[name]:
                begun = _used(reading, past, held.tokens[start:]) or begun
            else:
                what = "target" if name == TARGET else "draft"
                tell(f"{self._path} is of another {what}: this one reads the prompt afresh")
        if held is not None and name == TARGET:
            self._tell(tell, reading, begun, held)
            del held.pasts[TARGET]
        self.taken[name] = begun.read
        return begun

    def _once(self, tell: Tell) -> Tell:
        """A `tell` that repeats no line, although reading may begin several times."""

        def once(line: str) -> None:
            if line not in self._told:
                self._told.add(line)
                tell(line)

        return once

    def has_read(self, name: str, reading: Reading, caches: list[Any], start: int = 0) -> None:
        """Note what a model has read, for `keep` to write."""
        self._read[name] = _Read(reading, start, self.taken[name], caches)

    def keep(self, tell: Tell) -> None:
        """Write what was read, if that pays; after that there is nothing left to keep.

        It pays where a model read a chunk, or as much as it took from the file. So the part that
        is read again and again stays short, and a large file is not rewritten for every question
        about one document. Where the file cannot be written, `tell` gets a line; nothing is raised.
        """
        read, self._read = self._read, {}
        worth = any(
            len(one.reading.tokens) - one.taken >= max(1, min(CHUNK, one.taken))
            for one in read.values()
        )
        is_prompt = TARGET in read and len(read[TARGET].reading.tokens) < self._prompt_tokens
        if not (worth and is_prompt and self._may_write):
            return
        if lasting := _without_form([one.caches for one in read.values()]):
            tell(f"the prompt is not kept in {self._path}: there is no form for {lasting} on disk")
            return
        try:
            prompt_file.write(self._path, self._values(read))
        except OSError as error:
            tell(f"the prompt could not be kept in {self._path}: {error.strerror}")

    def _sound(self, tell: Tell) -> _Held | None:
        """The file's content, if it is sound and was written in the same setting."""
        try:
            values = prompt_file.read(self._path)
            if values is None:
                return None
            for name, setting in _settings(self._identity).items():
                if values[name] != setting:
                    raise Damaged(f"was written with another {name}")
        except Unusable as error:
            self._may_write = error.ours
            then = "and it is replaced" if error.ours else "and it is left as it is"
            tell(f"{self._path} {error}: the prompt is read afresh, {then}")
            return None
        pasts = [_Stored(**past) for past in values["pasts"]]
        return _Held(values["tokens"].tolist(), {past.name: past for past in pasts})

    def _values(self, read: Mapping[str, _Read]) -> dict[str, Any]:
        pasts = [
            _Stored(
                name,
                self._identity.models[name],
                one.start,
                len(one.reading.tokens),
                [cache.state for cache in one.caches],
            )._asdict()
            for name, one in read.items()
        ]
        tokens = mx.array(list(read[TARGET].reading.tokens), mx.int32)
        return {**_settings(self._identity), "tokens": tokens, "pasts": pasts}

    def _tell(self, tell: Tell, reading: Reading, begun: Begun, held: _Held) -> None:
        """Tell how much the target took, or why it took nothing."""
        length = len(reading.tokens) + 1
        if begun.read:
            tell(f"read {begun.read:,} of {length:,} tokens of the prompt from {self._path}")
        elif held.pasts[TARGET].model == self._identity.models[TARGET]:
            common = _common(held.tokens, reading.tokens)
            alone = ", which cannot be had without those after them" if common else ""
            tell(f"{self._path} has {common:,} of {length:,} tokens of the prompt{alone}")


def _settings(identity: Identity) -> dict[str, str]:
    """The setting that all models share, by the names used in notes."""
    return {
        "version of MLX or mlx-lm": identity.versions,
        "tokenizer": identity.tokenizer,
        "quantisation of keys and values": identity.kv,
    }


def _used(reading: Reading, past: _Stored, tokens: Sequence[int]) -> Begun | None:
    """The caches after as many of the text's tokens as the stored past covers, or None."""
    cached = reading.cached
    common = _common(tokens[: past.read], reading.tokens)
    if common < len(reading.tokens) and not _can_go_on(reading, common):
        return None
    caches = fresh_cache(cached.model, cached.kv)
    for cache, state in zip(caches, past.states, strict=True):
        cache.state = tree_map(_handle, state)
    if common < past.read:
        # Only of a fused model is it known that entries past a position leave no trace.
        if not (cached.fused and can_trim_prompt_cache(caches)):
            return None
        trim_prompt_cache(caches, past.read - common)
    return Begun(caches, common)


def _handle(value: Any) -> Any:
    """A new array with the same contents, so that the one held is not written to."""
    return mx.array(value) if isinstance(value, mx.array) else value


def _can_go_on(reading: Reading, read: int) -> bool:
    """Whether reading on after `read` tokens gives the same as reading from the beginning."""
    cached = reading.cached
    # The first chunk attends to keys and values that are not quantised yet.
    if cached.kv is not None and read < CHUNK:
        return False
    return is_exact(cached)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common before they part."""
    shorter = min(len(one), len(other))
    differs = np.array(one[:shorter]) != np.array(other[:shorter])
    return int(np.argmax(differs)) if differs.any() else shorter


def _without_form(caches: list[list[Any]]) -> str:
    """The kinds of caches whose state can be read but not set, in words."""
    kinds = {type(cache) for some in caches for cache in some}
    return ", ".join(sorted(kind.__name__ for kind in kinds if not kind.state.fset))
