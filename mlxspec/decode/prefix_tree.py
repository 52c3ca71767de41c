"""Pasts by the tokens that they are of: a radix tree under a cap in bytes.

Each node has the entries of the tokens on the way from its parent, so what texts have in common is
held once. A past ends at a node, which then has its rest. The least recently used past goes first,
and with it every entry that no other past needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple
from weakref import ref

import numpy as np

from mlxspec.models.kept import Entries, Kept, Rest, joined

NOTHING = Entries({}, 0)


class Node:
    """The tokens after a parent's, and what they have left.

    rest: of the past that ends here; None where none does. used: when that was used last.
    """

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], entries: Entries) -> None:
        self.parent = parent
        self.tokens = tokens
        self.entries = entries
        self.children: dict[int, Node] = {}
        self.rest: Rest | None = None
        self.used = 0
        if parent is not None:
            parent.children[tokens[0]] = self

    @property
    def parent(self) -> Node | None:
        return self._parent() if self._parent is not None else None

    @parent.setter
    def parent(self, parent: Node | None) -> None:
        # A node is held by the one above it alone, so its arrays are freed as soon as it is gone.
        self._parent = ref(parent) if parent is not None else None

    def path(self) -> list[Node]:
        """The nodes from the root, which is not among them, to this one."""
        above: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            above.append(node)
            node = node.parent
        return above[::-1]

    def below(self) -> Iterator[Node]:
        """This node and all below it, each after those above it."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            yield node

    def ends(self) -> Iterator[Node]:
        """The nodes from here on at which a past ends."""
        return (node for node in self.below() if node.rest is not None)

    @property
    def last_used(self) -> int:
        """When any past was used last that has these tokens."""
        return max((end.used for end in self.ends()), default=self.used)


class Found(NamedTuple):
    """A past of which the first `common` tokens are those of a text."""

    kept: Kept
    common: int


class _Place(NamedTuple):
    """The place up to which a text is in the tree: `inside` tokens after the node's parent."""

    node: Node
    inside: int
    common: int


class PrefixTree:
    """The pasts of several models.

    Args:
        max_bytes: the most bytes that its arrays take together, never exceeded.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._roots: dict[str, Node] = {}
        self._ends: set[Node] = set()
        self._clock = count(1)

    def __len__(self) -> int:
        """The number of pasts."""
        return len(self._ends)

    def common(self, name: str, tokens: Sequence[int]) -> int:
        """How many tokens a text has in common with any past before it parts from all."""
        return self._place(name, tokens).common

    def covered(self, name: str, tokens: Sequence[int]) -> int:
        """How many tokens of a text a model would not have to read."""
        return self._best(name, tokens)[1]

    def find(self, name: str, tokens: Sequence[int]) -> Found | None:
        """The past from which a model has the least of a text to read. It counts as used.

        Its entries are those of the common tokens alone.
        """
        end, common = self._best(name, tokens)
        if end is None or end.rest is None:
            return None
        end.used = next(self._clock)
        parts = [node.entries for node in end.path()]
        read = sum(part.length for part in parts)
        return Found(Kept(read, joined(parts, common), end.rest), common)

    def add(self, name: str, tokens: Sequence[int], kept: Kept) -> bool:
        """Keep the past of a text, as long as it fits once the least recently used ones are gone.

        Args:
            kept: of all of `tokens`, of which there is one at least.
        """
        tokens = tuple(tokens)
        if kept.size() > self.max_bytes:
            return False
        while True:
            place = self._place(name, tokens)
            ended = place.node.rest if place.inside == len(place.node.tokens) else None
            if place.common == len(tokens) and ended is not None:
                place.node.used = next(self._clock)
                return True
            if self.nbytes + kept.size(place.common) <= self.max_bytes:
                break
            self.drop_oldest()  # perhaps one that this one has tokens in common with
        self._put(place, tokens, kept)
        return True

    def drop_oldest(self) -> None:
        """Let the least recently used past go."""
        self._drop(min(self._ends, key=lambda end: end.used))

    def clear(self) -> None:
        """Let all pasts go."""
        self._roots.clear()
        self._ends.clear()
        self.nbytes = 0

    def nodes(self) -> Iterator[tuple[str, Node]]:
        """All nodes but the roots, with the name of their model."""
        for name, root in self._roots.items():
            yield from ((name, node) for node in root.below() if node is not root)

    def restore(
        self, name: str, tokens: Sequence[int], entries: Entries, rest: Rest | None, used: int
    ) -> None:
        """Put a node back under those above it, where there is room for it.

        Args:
            tokens: all up to its end. entries: of the last ones. used: when it was used last.
        """
        start, size = len(tokens) - entries.length, entries.nbytes + (rest.nbytes if rest else 0)
        while True:
            node, inside, common = self._place(name, tokens)
            if common != start or inside < len(node.tokens):
                return  # what comes before is missing, or these tokens are there
            if self.nbytes + size <= self.max_bytes:
                break
            if min((end.used for end in self._ends), default=used) >= used:
                return
            self.drop_oldest()
        node = Node(node, tuple(tokens[start:]), entries)
        node.rest, node.used = rest, used
        self.nbytes += size
        if rest is not None:
            self._ends.add(node)

    def prune(self) -> None:
        """Let nodes go that no past needs."""
        for _, node in list(self.nodes()):
            self._let_go(node)

    def _place(self, name: str, tokens: Sequence[int]) -> _Place:
        node = self._roots.setdefault(name, Node(None, (), NOTHING))
        at, inside = 0, 0
        while at < len(tokens) and inside == len(node.tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            inside = common_of(child.tokens, tokens[at : at + len(child.tokens)])
            at += inside
            node = child
        return _Place(node, inside, at)

    def _best(self, name: str, tokens: Sequence[int]) -> tuple[Node | None, int]:
        """The end of the past that has most in common with a text, and how much of it counts."""
        node, inside, common = self._place(name, tokens)
        while node.parent is not None:
            if node.rest is not None and inside == len(node.tokens):
                return node, common
            below = [end for end in node.ends() if end.rest is not None and end.rest.cuts]
            if below:
                return max(below, key=lambda end: end.used), common
            common -= inside
            node = node.parent
            inside = len(node.tokens)
        return None, 0

    def _put(self, place: _Place, tokens: tuple[int, ...], kept: Kept) -> None:
        node = place.node
        if place.inside < len(node.tokens):
            node = self._split(node, place.inside)
        if place.common < len(tokens):
            entries = kept.entries.part(place.common, len(tokens))
            node = Node(node, tokens[place.common :], entries)
            self.nbytes += entries.nbytes
        node.rest, node.used = kept.rest, next(self._clock)
        self.nbytes += kept.rest.nbytes
        self._ends.add(node)

    def _split(self, node: Node, inside: int) -> Node:
        """Put a node between one and its parent, with the first tokens; returns it."""
        assert node.parent is not None
        first, node.entries = node.entries.divided(inside)
        upper = Node(node.parent, node.tokens[:inside], first)
        node.tokens, node.parent = node.tokens[inside:], upper
        upper.children[node.tokens[0]] = node
        return upper

    def _drop(self, end: Node) -> None:
        assert end.rest is not None
        self.nbytes -= end.rest.nbytes
        end.rest = None
        self._ends.remove(end)
        self._let_go(end)

    def _let_go(self, node: Node) -> None:
        """Let a node go that no past needs, and those above it."""
        while node.parent is not None and node.rest is None and not node.children:
            self.nbytes -= node.entries.nbytes
            del node.parent.children[node.tokens[0]]
            node = node.parent


def common_of(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common before they part."""
    shorter = min(len(one), len(other))
    differs = np.array(one[:shorter]) != np.array(other[:shorter])
    return int(np.argmax(differs)) if differs.any() else shorter
