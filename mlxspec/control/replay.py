"""The proposals of a drafter that rounds would have kept along a known text. No MLX.

Right proposals follow the text, whatever K is. So it is enough to know, after every token, how
many tokens are proposed and how many of them are right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from mlxspec.control.estimates import acceptance_rates
from mlxspec.drafters.proposals import MOST, TextDrafter


class Proposed(NamedTuple):
    """How many tokens are proposed at a place, and how many of the first of them are right."""

    tokens: int
    right: int


def along_model(agrees: Sequence[bool], most: int) -> list[Proposed]:
    """The proposals of a model at each place of a text.

    Args:
        agrees: for each place, whether the model would propose the token there.
        most: K.
    """
    places: list[Proposed] = []
    run = 0
    for agreed in reversed(agrees):
        run = min(run + 1, most) if agreed else 0
        places.append(Proposed(most, run))
    return places[::-1]


def along_text(
    drafter: TextDrafter, prompt: Sequence[int], text: Sequence[int], most: int = MOST
) -> list[Proposed]:
    """The proposals of a new drafter, after the prompt and after each token of the text."""
    drafter.extend(prompt)
    places = []
    for at, token in enumerate(text):
        tokens = drafter.propose(most).tokens
        places.append(Proposed(len(tokens), agreeing(tokens, text[at : at + most])))
        drafter.extend([token])
    return places


def agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the beginning that two sequences have in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def rounds(places: Sequence[Proposed], sizes: Sequence[int]) -> list[Proposed]:
    """The rounds along a text, each with the largest of `sizes` that the proposal allows.

    Only whole rounds are included. A round proposes none where even the least size is too large.
    """
    found = []
    at = 0
    while at + max(sizes) < len(places):
        proposed, right = places[at]
        size = max((size for size in sizes if size <= proposed), default=0)
        found.append(Proposed(size, min(size, right)))
        at += found[-1].right + 1
    return found


def shortest(places: Sequence[Proposed], seconds: Mapping[int, float]) -> float:
    """The least time in seconds that rounds along a text can take, if their outcome is known.

    Args:
        seconds: the time of a round, by the number of tokens that it proposes, 0 included.
    """
    left = [0.0] * (len(places) + 1)  # from each place to the end
    for at, (proposed, right) in reversed(list(enumerate(places))):
        left[at] = min(
            took + left[min(at + 1 + min(size, right), len(places))]
            for size, took in seconds.items()
            if size <= proposed
        )
    return left[0]


def tokens_per_round(replayed: Sequence[Proposed]) -> float:
    return fmean(one.right + 1 for one in replayed)


def rates(replayed: Sequence[Proposed], count: int) -> tuple[float, ...]:
    """aⱼ for the positions 1 … `count`: how often each was accepted once it was reached."""
    reached = [sum(one.tokens > j and one.right >= j for one in replayed) for j in range(count)]
    hits = [sum(one.right > j for one in replayed) for j in range(count)]
    return tuple(acceptance_rates(hits, reached))
