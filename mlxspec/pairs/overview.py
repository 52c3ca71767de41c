"""A pair at a glance: what it takes on disk and in memory, and whether it fits this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mlxspec.control.records import Record
from mlxspec.device.memory import limit
from mlxspec.errors import MlxspecError
from mlxspec.pairs.memory import HEADROOM
from mlxspec.pairs.stock import Held, State, memory_of, stock
from mlxspec.pairs.table import Pair

ABOUT = 1.1  # of the weights: what a pair takes beside them, where only their size is known


@dataclass(frozen=True)
class Overview:
    """What is known of a pair beforehand.

    disk: bytes of its models, None where nobody says. memory: bytes that it needs, head-room
    included; `sure` where that is a sum, and not a guess from the size of its weights.
    """

    pair: Pair
    models: tuple[Held, ...]
    disk: int | None
    memory: int | None
    sure: bool
    fits: bool | None
    records: tuple[Record, ...]

    @property
    def state(self) -> State:
        states = {one.state for one in self.models}
        if states == {"here"}:
            return "here"
        return "absent" if states == {"absent"} else "in part"

    @property
    def speed_up(self) -> float | None:
        """The best that was measured here, None where nothing was."""
        found = [one.recommendation.speed_up for one in self.records if one.recommendation]
        return max(found, default=None)

    def as_dict(self) -> dict[str, Any]:
        return self.pair.as_dict() | {
            "disk_bytes": self.disk,
            "memory_bytes": self.memory,
            "memory_is_exact": self.sure,
            "fits": self.fits,
            "on_disk": self.state,
            "speed_up_here": self.speed_up,
        }


def overview(pair: Pair, records: Iterable[Record]) -> Overview:
    """What is known of a pair on this machine. The hub is not asked."""
    try:
        models = tuple(stock(pair))
    except MlxspecError:  # a name that cannot be one: `pairs show` says what is wrong with it
        models = ()
    known = tuple(one for one in records if is_of(one, pair))
    disk = round(1e9 * pair.gb) if pair.gb is not None else None
    if models and all(one.state == "here" for one in models):
        disk = sum(one.size for one in models)
        try:
            memory = memory_of(pair, list(models))
        except MlxspecError:
            pass
        else:
            return Overview(pair, models, disk, memory.total, True, memory.fits, known)
    guess = None if disk is None else round(disk * (ABOUT + HEADROOM))
    fits = None if guess is None else guess <= limit()
    return Overview(pair, models, disk, guess, False, fits, known)


def is_of(record: Record, pair: Pair) -> bool:
    """Whether a record is one of this pair's."""
    return (record.setting.target, record.setting.draft) == (pair.target_name, pair.draft_name)


Fits = Literal["yes", "no", "?"]


def in_word(fits: bool | None) -> Fits:
    return "?" if fits is None else "yes" if fits else "no"
