"""How many proposals rounds would keep, counted along texts that plain decoding has written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import mlx.core as mx

from mlxspec.control import replay
from mlxspec.control.estimates import SIZES
from mlxspec.control.replay import Proposed
from mlxspec.decode.engine import Engine
from mlxspec.defaults import MAX_AUTO_TOKENS
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.prefill import Reading, finished, prefill

Text = tuple[list[int], list[int]]  # a prompt, and what follows it


def written(engine: Engine, prompt: Sequence[int], tokens: int, text: list[int]) -> Iterator[int]:
    """Decode a prompt plainly and greedily, and add what follows to `text`, token by token.

    Yields:
        How many tokens are written.
    """
    session = engine.session(prompt, max_tokens=tokens, draft_tokens=0)
    while committed := session.step().tokens:
        text += committed
        yield len(text)


def agreement(cached: CachedModel, text: Text) -> list[bool]:
    """For every token after the prompt, whether a draft would propose it."""
    prompt, following = text
    caches, _ = finished(prefill(Reading(cached, prompt[:-1])))
    rows = mx.minimum(mx.array([[prompt[-1], *following[:-1]]]), cached.vocabulary - 1)
    best = mx.argmax(cached.model(rows, cache=caches)[0], axis=-1)
    return cast(list[bool], (best == mx.array(following)).tolist())


def of_model(cached: CachedModel, texts: Sequence[Text], most: int) -> dict[int, list[Proposed]]:
    """The rounds of a draft model along texts, for every K that they are long enough for.

    Args:
        most: the largest K.
    """
    along = [replay.along_model(agreement(cached, text), MAX_AUTO_TOKENS) for text in texts]
    return _replayed(along, {count: [count] for count in range(1, most + 1)})


def of_text(
    make: Callable[[], TextDrafter], texts: Sequence[Text], most: int
) -> dict[int, list[Proposed]]:
    """The rounds of a text drafter along texts, for every largest K that they are long enough for.

    Args:
        most: the largest K.
    """
    along = [replay.along_text(make(), *text) for text in texts]
    sizes = [size for size in SIZES if size <= most]
    return _replayed(along, {size: [one for one in SIZES if one <= size] for size in sizes})


def _replayed(
    along: Sequence[Sequence[Proposed]], sizes: Mapping[int, Sequence[int]]
) -> dict[int, list[Proposed]]:
    """The rounds of every K along all texts; a K without a whole round is not there."""
    found = {
        count: [one for places in along for one in replay.rounds(places, of_round)]
        for count, of_round in sizes.items()
    }
    return {count: replayed for count, replayed in found.items() if replayed}
