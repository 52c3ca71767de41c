"""Watches that every round writes into the room of its caches: MLX does not check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from mlxspec.decode.round import FusedRound
from mlxspec.decode.state import RoundState, Shape
from mlxspec.models.caches.positional import UNBOUNDED
from mlxspec.models.followers import room_of

HELD = 64  # places that are looked at together, so that no round waits for them


class Written(NamedTuple):
    """Where a round writes: `rows` entries from `places` on, int32 [B], with room for `room`."""

    who: str
    places: mx.array
    rows: int
    room: int
    shape: Shape

    def require_room(self) -> None:
        last = max(self.places.tolist())
        assert last + self.rows <= self.room, (
            f"{self.who} writes {self.rows} entries at {self.places.tolist()}, "
            f"and has room for {self.room}: {self.shape}"
        )


def written(rounds: FusedRound, state: RoundState, shape: Shape) -> Iterator[Written]:
    """What a round writes to the caches of its models and heads."""
    count, place = shape.draft_tokens, state.position
    yield Written("the target", place, count + 1, min(state.capacity, shape.length), shape)
    for name, past in state.drafts.items():
        if name in rounds.heads:
            room = rounds.heads[name].room(past)
            yield Written(name, place, count + 1, room, shape)
        elif name == shape.drafter:
            room = min(room_of(past.layers), shape.draft_length)
            yield Written(name, mx.maximum(place - past.start, 0), count, room, shape)


@contextmanager
def watched() -> Iterator[None]:
    """Fail where any round inside would write beyond the room of its caches."""
    held: list[Written] = []
    run = FusedRound.run

    def watching(self: FusedRound, state: RoundState, shape: Shape, *rest: Any, **more: Any) -> Any:
        held.extend(one for one in written(self, state, shape) if one.room < UNBOUNDED // 2)
        after = run(self, state, shape, *rest, **more)
        while len(held) > HELD:
            held.pop(0).require_room()
        return after

    FusedRound.run = watching  # type: ignore[method-assign]
    try:
        yield
    finally:
        FusedRound.run = run  # type: ignore[method-assign]
    for one in held:
        one.require_room()
