"""The past of a prompt on disk, for the next run whose prompt begins with the same tokens.

The file holds the tokens that were read and the resulting caches of the target and the drafts,
each with the number of its tokens and the identity of its model. Each model takes what it can use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxspec.decode import prompt_file
from mlxspec.decode.prefix_tree import Found, common_of
from mlxspec.decode.prefixes import Marked
from mlxspec.decode.prompt_file import Damaged, Unusable
from mlxspec.files import require_no_folder
from mlxspec.metrics import TARGET, Tell
from mlxspec.models.identity import Identity
from mlxspec.models.kept import Entries, Kept, Rest, resumed, without_form
from mlxspec.models.prefill import CHUNK, Begun, Marks, Reading, afresh

PLACES = 6  # of a text, the last ones, from which another can go on where a past cannot go back


class _Stored(NamedTuple):
    """What a model had after `read` of the file's tokens, from `start` on.

    arrays: its entries. rests: the rest at some places, the last of them at the end: how many
        tokens it had read, the states, and whether they can go back.
    """

    name: str
    model: str
    start: int
    read: int
    arrays: dict[str, list[mx.array]]
    rests: list[tuple[int, list[Any], bool]]

    def found(self, held: Sequence[int], tokens: Sequence[int]) -> Found | None:
        """The past from which a model has the least of `tokens` to read.

        Args:
            held: the tokens of the file.
        """
        common = common_of(held[self.start :][: self.read], tokens)
        for at, states, cuts in reversed(self.rests):
            if at <= common or cuts:
                kept = Kept(at, Entries(self.arrays, self.read), Rest(states, cuts))
                return Found(kept, min(at, common))
        return None


class _Held(NamedTuple):
    """The content of a file: token ids, and the past of each model after some of them."""

    tokens: list[int]
    pasts: dict[str, _Stored]


class _Read(NamedTuple):
    """A reading to be kept: the text from `start` on, `taken` tokens of it from the file."""

    reading: Reading
    start: int
    taken: int
    pasts: list[Kept]  # at some places, the last of them at the end


class PromptCache:
    """A file that a session begins from, and keeps its prompt in; see `Keeper`.

    Args:
        path: of the file, which need not exist.
        identity: of the models that read.
        prompt_tokens: the length of the prompt; a longer text is not kept, being no prompt.
        ends: tokens that end a turn.

    Raises:
        UsageError: the path is that of a folder.
    """

    is_file = True

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        prompt_tokens: int,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        require_no_folder(path)
        self.taken: dict[str, int] = {}
        self._marked = Marked(ends)
        self._path = path
        self._identity = identity
        self._prompt_tokens = prompt_tokens
        self._may_write = True
        self._held: _Held | None = None  # the drafts' part of the file, until they read
        self._read: dict[str, _Read] = {}
        self._rests: dict[str, list[tuple[int, list[Any], bool]]] = {}  # of what was taken
        self._told: set[str] = set()

    def begun(self, name: str, reading: Reading, tell: Tell, start: int = 0) -> Begun:
        tell = self._once(tell)
        if name == TARGET:
            self._may_write = True
            self._held = self._sound(tell) if reading.tokens else None
        begun, held = afresh(reading), self._held
        past = held.pasts.get(name) if held is not None else None
        if held is not None and past is not None and past.start == start:
            if past.model == self._identity.models[name]:
                found = past.found(held.tokens, reading.tokens)
                begun = (found and resumed(reading, *found)) or begun
            else:
                what = "target" if name == TARGET else "draft"
                tell(f"{self._path} is of another {what}: this one reads the prompt afresh")
        if held is not None and name == TARGET:
            self._tell(tell, reading, begun, held)
            del held.pasts[TARGET]  # for its memory
        self.taken[name] = begun.read
        self._rests[name] = [one for one in past.rests if one[0] <= begun.read] if past else []
        return begun

    def _once(self, tell: Tell) -> Tell:
        """A `tell` that repeats no line, although reading may begin several times."""

        def once(line: str) -> None:
            if line not in self._told:
                self._told.add(line)
                tell(line)

        return once

    def marks(self, name: str, reading: Reading) -> Marks:
        return self._marked.marks(name, reading)

    def has_read(
        self, name: str, reading: Reading, past: tuple[list[Any], Any], start: int = 0
    ) -> None:
        if without_form(past[0]):
            return
        pasts = self._marked.pasts(name, reading, past)
        self._read[name] = _Read(reading, start, self.taken[name], pasts)

    def has_written(self, name: str, reading: Reading, kept: Kept) -> None:
        """A file keeps the prompt and no more."""

    def held(self, name: str, tokens: Sequence[int]) -> int:
        past = self._held.pasts.get(name) if self._held is not None else None
        if self._held is None or past is None or past.model != self._identity.models[name]:
            return 0
        found = past.found(self._held.tokens, tokens)
        return found.common if found is not None else 0

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
                one.pasts[-1].entries.arrays,
                (self._rests[name] + [(past.read, *past.rest) for past in one.pasts])[-PLACES:],
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
            common = common_of(held.tokens, reading.tokens)
            alone = ", which cannot be had without those after them" if common else ""
            tell(f"{self._path} has {common:,} of {length:,} tokens of the prompt{alone}")


def _settings(identity: Identity) -> dict[str, str]:
    """The setting that all models share, by the names used in notes."""
    return {
        "version of MLX or mlx-lm": identity.versions,
        "tokenizer": identity.tokenizer,
        "quantisation of keys and values": identity.kv,
    }
