"""A prefix cache in memory: texts whose prompts begin alike begin from what was read of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from weakref import ref

from mlxspec.decode import prefix_folder
from mlxspec.decode.prefix_tree import PrefixTree
from mlxspec.errors import UsageError
from mlxspec.metrics import TARGET, Tell, silent
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.caches.original import Model
from mlxspec.models.identity import Identity, identity_of
from mlxspec.models.kept import Kept, Rest, kept_of, needs_rest, rest_of, resumed, without_form
from mlxspec.models.prefill import CHUNK, Begun, Marks, Reading, afresh
from mlxspec.tokens import Tokenizer

DEFAULT_BYTES = 10**9  # of a batch that is given no cache
SHORT = 8  # a beginning of less than an eighth of a chunk is read again as quickly as found


class Keeper(Protocol):
    """What outlasts a text: a reading may begin from it, and is kept in it.

    Models are known by name: TARGET, and the names of the drafts.

    taken: the number of tokens that each model last took from it.
    is_file: whether `keep` may write a file.
    """

    taken: dict[str, int]
    is_file: bool

    def begun(self, name: str, reading: Reading, tell: Tell, start: int = 0) -> Begun:
        """The part of a model's tokens that is read already, in new caches at every call.

        Args:
            start: where its tokens begin in the text.
            tell: called with notes for the user.
        """

    def marks(self, name: str, reading: Reading) -> Marks:
        """The places at which a reading is to stop, for its past there to be kept."""

    def has_read(
        self, name: str, reading: Reading, past: tuple[list[Any], Any], start: int = 0
    ) -> None:
        """Note what a model and its follower have read: the caches, and the follower's past."""

    def has_written(self, name: str, reading: Reading, kept: Kept) -> None:
        """Note the past of a text that has ended, or of its beginning."""

    def held(self, name: str, tokens: Sequence[int]) -> int:
        """The number of tokens that a model would not have to read."""

    def keep(self, tell: Tell) -> None:
        """Write what was read to the file, once."""


class Owner(Protocol):
    """An engine, as far as its pasts depend on it."""

    tokenizer: Tokenizer | None
    models: list[CachedModel]
    drafts: dict[str, Model]


class PrefixStats(NamedTuple):
    """What a `PrefixCache` holds and has done.

    nbytes, max_bytes: what its arrays take, and the most that they may take.
    pasts: the number of pasts, of all models.
    texts, hits: texts that targets have read, and those that began from a past.
    tokens, hit_tokens: of their prompts, and those of them that were not read again.
    """

    nbytes: int
    max_bytes: int
    pasts: int
    texts: int
    hits: int
    tokens: int
    hit_tokens: int


class PrefixCache:
    """The pasts of one engine's texts, by their tokens, under a cap; for one thread.

    The least recently used past goes first. No array is held beyond `max_bytes`, and a past that is
    larger by itself is not kept.

    Args:
        max_bytes: the most bytes that its arrays take together; 0 keeps nothing.

    Raises:
        UsageError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes < 0:
            raise UsageError(f"max_bytes is {max_bytes}.", hint="It must be 0 or more.")
        self._tree = PrefixTree(max_bytes)
        self._models: tuple[ref[CachedModel], ...] = ()
        self._texts = self._hits = self._tokens = self._hit_tokens = 0

    @property
    def stats(self) -> PrefixStats:
        tree, counts = self._tree, (self._texts, self._hits, self._tokens, self._hit_tokens)
        return PrefixStats(tree.nbytes, tree.max_bytes, len(tree), *counts)

    def clear(self) -> None:
        """Let all pasts go; what it has counted stays."""
        self._tree.clear()

    def save(self, folder: str | Path, owner: Owner) -> None:
        """Keep the pasts in a folder, of which a later process can take them.

        Args:
            folder: takes no more bytes of pasts of these models than this cache may have. What it
                has of others is left as it is.
            owner: the engine.

        Raises:
            MlxspecError: the folder cannot be written.
        """
        prefix_folder.save(self._tree, Path(folder), identity_of_owner(owner))

    def load(self, folder: str | Path, owner: Owner, tell: Tell = silent) -> None:
        """Add the pasts that were saved of the same models, as far as they fit.

        Args:
            folder: need not exist.
            owner: the engine.
            tell: gets a line for each file that cannot be used.
        """
        prefix_folder.load(self._tree, Path(folder), identity_of_owner(owner), tell)

    def for_text(self, models: Sequence[CachedModel], ends: frozenset[int]) -> PrefixKeeper:
        """What one text of an engine begins from, and is kept in.

        Args:
            models: of the engine. ends: tokens that end a turn.

        Raises:
            UsageError: it has pasts of another engine.
        """
        if not self._models:
            self._models = tuple(ref(one) for one in models)
        if [one() for one in self._models] != list(models):
            raise UsageError(
                "This prefix cache has pasts of another engine.",
                hint="Give each engine a PrefixCache of its own.",
            )
        return PrefixKeeper(self, self._tree, ends)

    def count(self, read: int, taken: int) -> None:
        """Note that a target has `read` a text, of which it had `taken` some tokens from here."""
        self._texts += 1
        self._hits += taken > 0
        self._tokens += read
        self._hit_tokens += taken


class Marked:
    """The rests of a text's readings, at places that others may go on from.

    Args:
        ends: tokens that end a turn.
    """

    def __init__(self, ends: frozenset[int]) -> None:
        self._ends = ends
        self._rests: dict[str, dict[int, Rest]] = {}

    def marks(self, name: str, reading: Reading, common: int = 0) -> Marks:
        """The places at which a reading is to stop.

        Args:
            common: how many tokens it has in common with another text.
        """
        rests = self._rests[name] = {}
        if not needs_rest(reading):
            return Marks()

        def reached(at: int, caches: list[Any], past: Any) -> None:
            if not without_form(caches):
                rests[at] = rest_of(reading.cached, caches, past, at)

        return Marks(_places(reading, self._ends, common), reached)

    def pasts(self, name: str, reading: Reading, past: tuple[list[Any], Any]) -> list[Kept]:
        """The pasts of a reading at its marks and, the last of them, at its end."""
        kept = kept_of(reading, *past)
        rests = self._rests.pop(name, {})
        return [*(Kept(at, kept.entries, rest) for at, rest in sorted(rests.items())), kept]


class PrefixKeeper:
    """A prefix cache as one text sees it; see `Keeper`."""

    is_file = False

    def __init__(self, cache: PrefixCache, tree: PrefixTree, ends: frozenset[int]) -> None:
        self.taken: dict[str, int] = {}
        self._cache = cache
        self._tree = tree
        self._marked = Marked(ends)
        self._begun: set[tuple[str, int]] = set()
        self._is_short = False  # of memory, so that nothing more is kept

    def begun(self, name: str, reading: Reading, tell: Tell, start: int = 0) -> Begun:
        if (name, start) in self._begun:  # once more, because memory ran out
            self._is_short = True
            self._tree.clear()
        self._begun.add((name, start))
        found = self._tree.find(_key(name, reading), reading.tokens)
        begun = resumed(reading, *found) if found is not None else None
        begun = begun or afresh(reading)
        self.taken[name] = begun.read
        return begun

    def marks(self, name: str, reading: Reading) -> Marks:
        common = self._tree.common(_key(name, reading), reading.tokens)
        return self._marked.marks(name, reading, common)

    def has_read(
        self, name: str, reading: Reading, past: tuple[list[Any], Any], start: int = 0
    ) -> None:
        if self._is_short:
            return
        if name == TARGET:
            self._cache.count(len(reading.tokens) + 1, self.taken[name])
        if self.taken[name] < len(reading.tokens) and not without_form(past[0]):
            for kept in self._marked.pasts(name, reading, past):
                self._tree.add(_key(name, reading), reading.tokens[: kept.read], kept)

    def has_written(self, name: str, reading: Reading, kept: Kept) -> None:
        if reading.tokens and not self._is_short:
            self._tree.add(_key(name, reading), reading.tokens, kept)

    def held(self, name: str, tokens: Sequence[int]) -> int:
        return self._tree.covered(name, tokens)

    def keep(self, tell: Tell) -> None:
        """Nothing is left to do."""


def identity_of_owner(owner: Owner) -> Identity:
    """All that decides the pasts of an engine."""
    models = dict(zip([TARGET, *owner.drafts], owner.models, strict=True))
    return identity_of(models, owner.tokenizer)


def _key(name: str, reading: Reading) -> str:
    """Pasts that heads have read along with are apart from those without."""
    return " ".join([name, *reading.follower.names])


def _places(reading: Reading, ends: frozenset[int], common: int) -> frozenset[int]:
    """The places that other texts may go on from, where a past cannot go back to any.

    They are the ends of the first turn, which many texts have in common, and of the last, behind
    which an answer begins with a reasoning that no later prompt repeats; the place where the text
    parts from all others; and the ends of the last chunk and of one halfway there.
    """
    tokens, length = reading.tokens, len(reading.tokens)
    turns = [at for at, token in enumerate(tokens, start=1) if token in ends]
    chunks = [length // CHUNK * CHUNK, length // CHUNK // 2 * CHUNK]
    places = {*turns[:1], *turns[-1:], *chunks, common if common >= CHUNK // SHORT else 0}
    # Before the end of the first chunk, keys and values are not quantised yet.
    first = 1 if reading.cached.kv is None else CHUNK
    return frozenset(place for place in places if first <= place < length)
