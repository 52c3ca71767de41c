"""Tokens that count how often they are looked at: a measure of cost that needs no clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Looked(int):
    """A token that counts how often any of its kind is hashed or compared."""

    count = 0

    def __eq__(self, other: object) -> bool:
        Looked.count += 1
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        Looked.count += 1
        return int(self) != other

    def __hash__(self) -> int:
        Looked.count += 1
        return int.__hash__(self)


def looked(length: int) -> dict[str, list[int]]:
    """Texts with which it is easy to take longer and longer; no token is the same object twice."""
    two = random.Random(0).choices(range(2), k=length)
    texts = {"one token": [0] * length, "a period": [at % 2 for at in range(length)], "two": two}
    return {kind: [Looked(token) for token in text] for kind, text in texts.items()}


@contextmanager
def looks() -> Iterator[Callable[[], int]]:
    """How many looks there were since the beginning."""
    before = Looked.count
    yield lambda: Looked.count - before
