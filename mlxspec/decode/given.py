"""The host's part in the proposals of a round: what texts propose of their own, and limits."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxspec.control.policy import Plan
from mlxspec.decode.state import NOTHING, Given
from mlxspec.decode.track import Track

_SOME = mx.array(0)


def given_of(plan: Plan, rows: Sequence[Track | None], *, drafts: bool) -> Given:
    """The arrays of a round.

    Args:
        drafts: whether a model drafts in it.
    """
    count = plan.whole.draft_tokens
    own = [
        track.proposed(one) if track is not None else ()
        for track, one in zip(rows, plan.rows, strict=True)
    ]
    filled = [[*tokens, *[0] * (count - len(tokens))] for tokens in own]
    if len(rows) == 1:
        return Given(mx.array(filled, mx.int32)) if own[0] else NOTHING
    both = zip(rows, plan.rows, strict=True)
    limit = [-1 if track is None else one.draft_tokens for track, one in both]
    limits = mx.array(limit, mx.int32)
    if not _has_tokens(count, rows, drafts=drafts):
        return Given(limit=limits)
    is_given = mx.array([bool(tokens) for tokens in own]) if drafts else None
    return Given(mx.array(filled, mx.int32), limits, is_given)


def sort_of(count: int, rows: Sequence[Track | None], *, drafts: bool) -> Given:
    """The arrays that a round of several rows and K = `count` has, whatever they hold."""
    if not _has_tokens(count, rows, drafts=drafts):
        return Given(limit=_SOME)
    return Given(_SOME, _SOME, _SOME if drafts else None)


def _has_tokens(count: int, rows: Sequence[Track | None], *, drafts: bool) -> bool:
    # Where any text may propose in some round, all rounds are of the kind in which it does: one
    # graph to build in place of two.
    return count > 0 and (not drafts or any(track is not None and track.follows for track in rows))
