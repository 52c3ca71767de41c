"""A round that was dispatched and not read yet."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlxspec.control.policy import Plan
from mlxspec.decode.track import Track
from mlxspec.parked import Parked


class CaughtUp(NamedTuple):
    """What a draft model has read before a round: so many tokens, of so many texts.

    begun_s: when it began, by `time.perf_counter`.
    """

    name: str
    tokens: int
    texts: int
    begun_s: float


class InFlight(NamedTuple):
    """What the host knows of the round.

    tracks: the texts that take part, by row. plan: its rows are the choices of `tracks`.
    synced: the texts whose draft model has read all before it, and reads along.
    fair: whether its time includes no building that later rounds do not need.
    waited: whether it was dispatched only once the round before it was read.
    dispatched_s, dispatching_s: see `Marks`.
    caught_up: what was read before it, in the same evaluation; None where nothing was.
    """

    tracks: tuple[Track | None, ...]
    plan: Plan
    synced: tuple[Track, ...]
    result: mx.array
    fair: bool
    waited: bool
    parked: Parked | None
    dispatched_s: float
    dispatching_s: float
    caught_up: CaughtUp | None
