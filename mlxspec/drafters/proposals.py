"""Proposals, what a round chooses among them, and the seam of drafters without a model. No MLX."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

GRADES = 5
# What is expected of a proposal of each grade before any was seen: about what came out for source
# files that are edited, and for text that hardly repeats.
PRIORS = (0.3, 0.55, 0.75, 0.85, 0.95)
MOST = 31  # proposals: with the token before them they are 32 rows, which kernels like


class Proposal(NamedTuple):
    """Tokens that are proposed with certainty, q = 1 for each; maybe none.

    `grade`, 0 to GRADES - 1, tells how much speaks for them. It promises nothing by itself:
    acceptance is counted for each grade apart.
    """

    tokens: tuple[int, ...]
    grade: int


@dataclass(frozen=True)
class Choice:
    """What a round does. `drafter` is "" when nothing is proposed.

    `grade` tells apart what a drafter proposes from the text; acceptance is counted for each.
    """

    drafter: str
    draft_tokens: int
    grade: int = 0


PLAIN = Choice("", 0)


@dataclass(frozen=True)
class Offer:
    """A drafter can propose so many tokens from the text."""

    drafter: str
    tokens: int
    grade: int


class TextDrafter(Protocol):
    """Proposes from the text alone, on the host.

    `most` is how many tokens it is worth asking for.
    """

    name: str
    most: int

    def extend(self, tokens: Sequence[int]) -> None:
        """What was added to the text: the prompt first, then what each round committed."""

    def propose(self, limit: int) -> Proposal:
        """At most `limit` tokens to follow the text."""


def grade(count: int, bounds: Sequence[int]) -> int:
    """How many of the GRADES - 1 ascending `bounds` a count reaches."""
    return bisect_right(bounds, count)
