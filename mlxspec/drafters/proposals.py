"""Proposals, a round's choice among them, and the interface of text drafters. No MLX."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

GRADES = 5
# The acceptance rate expected of each grade before any proposal was seen: about what was measured
# on edited source files, and on text that hardly repeats.
PRIORS = (0.3, 0.55, 0.75, 0.85, 0.95)
MOST = 31  # proposals: with the token before them they are 32 rows, a good size for kernels


class Proposal(NamedTuple):
    """Tokens that are proposed with certainty, q = 1 for each; maybe none.

    `grade`, 0 to GRADES - 1, ranks the evidence for them. It promises nothing by itself:
    acceptance is counted for each grade separately.
    """

    tokens: tuple[int, ...]
    grade: int


@dataclass(frozen=True)
class Choice:
    """The drafter and K of a round. `drafter` is "" when nothing is proposed.

    `grade` is that of a proposal from the text; acceptance is counted for each grade.
    """

    drafter: str
    draft_tokens: int
    grade: int = 0


PLAIN = Choice("", 0)


@dataclass(frozen=True)
class Offer:
    """The offer of a text drafter to propose `tokens` tokens."""

    drafter: str
    tokens: int
    grade: int


class TextDrafter(Protocol):
    """Proposes from the text alone, on the host.

    `most` is the largest number of tokens worth asking for.
    """

    name: str
    most: int

    def extend(self, tokens: Sequence[int]) -> None:
        """Read tokens added to the text: the prompt first, then those that each round committed."""

    def propose(self, limit: int) -> Proposal:
        """Propose at most `limit` tokens to follow the text."""


def grade(count: int, bounds: Sequence[int]) -> int:
    """How many of the GRADES - 1 ascending `bounds` a count reaches."""
    return bisect_right(bounds, count)
