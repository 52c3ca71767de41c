"""The state of rounds, for B texts side by side, and what distinguishes one round from another.

A text that joins is written into a row, and costs what one row costs. One that leaves costs
nothing: its row stays where it is until another text takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from mlxspec.models.caches.layers import Layers, capacity_of
from mlxspec.sampling.sampler import Knobs


class RoundState(NamedTuple):
    """All that a round needs and changes, for B sequences side by side.

    position: int32 [B], of the last committed token, which is not in the target's cache yet.
    last_two: int32 [B, 2], the last two committed tokens.
    recent: int32 [B, W], the last W tokens up to it, with NO_TOKEN before the first; the whole
        text where the sampler sees it.
    keys: uint32 [B, 2], of the random numbers; they never change.
    knobs: the sampling parameters, float32 [B] each.
    target: the caches' storage. drafts: the pasts of draft models and heads, by name; one that has
        read nothing is not among them.
    """

    position: mx.array
    last_two: mx.array
    recent: mx.array
    keys: mx.array
    knobs: Knobs
    target: Layers
    drafts: dict[str, Any]

    @property
    def capacity(self) -> int:
        """The number of positions that the target's caches have room for."""
        return capacity_of(self.target)

    def with_draft(self, name: str, past: Any) -> RoundState:
        return self._replace(drafts={**self.drafts, name: past})


class Shape(NamedTuple):
    """All that distinguishes one graph of a round from another.

    drafter: the model that proposes; "" where the proposals are given, or there are none.
    length, draft_length: entries to attend over in the target's and the drafter's caches.
    is_given: whether the host gives proposals of its own. is_ragged: whether rows differ in K.
    rows: B. logprobs: whether log-probabilities are told, for which the logits come out too.
    """

    drafter: str
    draft_tokens: int
    length: int
    draft_length: int
    is_given: bool
    is_ragged: bool = False
    rows: int = 1
    logprobs: bool = False


class Given(NamedTuple):
    """The host's part in a round's proposals, row by row.

    tokens: int32 [B, K], proposed from the texts; None where a model proposes in every row.
    limit: int32 [B], the number of tokens that each row proposes, at most K; a row of -1 holds no
        text, and stays where it is. None is K for all.
    is_given: boolean [B], the rows that take `tokens`, beside a model's; None is all.
    """

    tokens: mx.array | None = None
    limit: mx.array | None = None
    is_given: mx.array | None = None


NOTHING = Given()


def placed(whole: Any, one: Any, row: int) -> Any:
    """A tree of arrays, [B, …] each, with the only row of another such tree in place of a row.

    The other's arrays may be smaller on any axis but the first; nothing past them changes. Drop
    every reference to the old tree before this is computed, or its arrays are copied.
    """

    starts: dict[int, mx.array] = {}

    def written(into: mx.array, rows: mx.array) -> mx.array:
        axes = tuple(range(into.ndim))
        if into.ndim not in starts:
            starts[into.ndim] = mx.array([row] + [0] * (into.ndim - 1), mx.int32)
        return mx.slice_update(into, rows.astype(into.dtype), starts[into.ndim], axes=axes)

    return tree_map(written, whole, one)


def chosen(whole: Any, rows: Sequence[int]) -> Any:
    """The given rows of a tree of arrays, [B, …] each, in that order. A row may come up twice."""
    index = mx.array(list(rows), mx.int32)
    return tree_map(lambda array: mx.take(array, index, axis=0), whole)
