"""Rounds as a stream tells them beside its text, where a request asks for that."""

from __future__ import annotations

from typing import Any

from mlxspec.metrics import TARGET, Event, Piece


def trace_of(index: int, event: Event) -> dict[str, Any]:
    """One round of one text: what was proposed and kept, its tokens, and the text by author.

    It has the empty `choices` of a chunk, so that clients who do not know it skip it. The text may
    lag behind the tokens, where it could still become part of a stop string or of a character.
    """
    stats = event.round
    return {
        "object": "mlxspec.round",
        "choices": [],
        "index": index,
        "source": stats.drafter if stats is not None else "",
        "drafted": stats.drafted if stats is not None else 0,
        "accepted": stats.accepted if stats is not None else 0,
        "token_ids": list(event.tokens),
        "pieces": [_told(piece, event) for piece in event.pieces if piece.text],
    }


def _told(piece: Piece, event: Event) -> dict[str, Any]:
    drafted = piece.from_draft and event.round is not None and event.round.drafter
    told: dict[str, Any] = {"by": drafted or TARGET, "text": piece.text}
    return told | {"reasoning": True} if piece.reasoning else told
