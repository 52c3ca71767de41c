"""Heads: drafters on the target's own features, as a round and the reading of a prompt see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from uuid import uuid4

import mlx.core as mx

from mlxspec.drafters.graph import Proposer
from mlxspec.drafters.picks import Picks
from mlxspec.models.followers import grown, room_of, typed
from mlxspec.models.rotary import shared_angles
from mlxspec.models.taps import Features


class Head(Proposer, Protocol):
    """A drafter on the target's features, such as a trained head. See docs/drafters.md.

    It is told of all that the target reads: pieces of a prompt, and every round, whoever drafts.

    A head keeps what it needs of a text in a *past*, a tree of arrays, [B, …] each, and changes
    none that it is given. Keys and values by position stand in a `FullLayer`: it grows with the
    text, and texts that begin alike share it. All else in a past is its state at one place.

    A head may have a `block`, the most rows that it reads at once: its past has room for so many
    beyond the text, and a controller expects it to draft any number of tokens in the same time.

    A head may have an `identity` beside this, a string that no other weights have: then a prompt
    cache on disk keeps its pasts.
    """

    def begin(self, capacity: int) -> Any:
        """The past of one text of which nothing was read, B = 1, with room for `capacity` tokens.

        Its form, shapes and dtypes are those of every past, but for B and the room.
        """


class HeadDrafter:
    """A head as a `GraphDrafter`: it follows every round, and its past grows with the target's."""

    follows = True
    fused = True
    beside = True

    def __init__(self, head: Head) -> None:
        self._head = head
        self.taps = head.taps
        self.most = head.most
        # One that cannot be told from others is never taken for one that wrote a file.
        self.identity: str = getattr(head, "identity", None) or uuid4().hex
        self._block: int = getattr(head, "block", 0)
        self.at_once = self._block > 0
        self._like = head.begin(1)  # never computed

    def typed(self, past: Any) -> Any:
        return typed(self._like, past)

    def begin(self, capacity: int) -> Any:
        return self._head.begin(capacity + self._block)

    def grown(self, past: Any, capacity: int) -> Any:
        return grown(past, capacity + self._block)

    def room(self, past: Any) -> int:
        """The number of positions of a text that a past has room for."""
        return room_of(past) - self._block

    def propose(
        self,
        past: Any,
        last_two: mx.array,
        position: mx.array,
        picks: Picks,
        count: int,
        length: int,
    ) -> Any:
        with shared_angles():
            return self._head.propose(past, last_two, position, picks, count, length + self._block)

    def commit(
        self,
        past: Any,
        tokens: mx.array,
        features: Features,
        position: mx.array,
        kept: mx.array | None,
    ) -> Any:
        with shared_angles():
            return self._head.commit(past, tokens, features, position, kept)


class Heads:
    """All heads of a target, as the `Follower` of its reading; their pasts by name.

    Args:
        capacity: tokens that a text may have before its pasts grow.
    """

    def __init__(self, heads: Mapping[str, HeadDrafter], capacity: int) -> None:
        self._heads = heads
        self._capacity = capacity
        self.taps: Sequence[str] = tuple(tap for head in heads.values() for tap in head.taps)
        self.names: Sequence[str] = tuple(
            f"{name}:{head.identity}" for name, head in sorted(heads.items())
        )

    def begin(self) -> dict[str, Any]:
        return {name: head.begin(self._capacity) for name, head in self._heads.items()}

    def read(
        self, past: dict[str, Any], tokens: mx.array, features: Features, at: int
    ) -> dict[str, Any]:
        place = mx.array([at], mx.int32)
        return {
            name: head.commit(past[name], tokens, features, place, None)
            for name, head in self._heads.items()
        }
