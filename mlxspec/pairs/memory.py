"""The memory that a pair needs for a text of some length, against what this machine has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlxspec.decode.drafts import WINDOW
from mlxspec.defaults import MAX_AUTO_TOKENS, MAX_DRAFT_TOKENS
from mlxspec.models.footprint import Footprint, Kind
from mlxspec.models.prefill import CHUNK

# Of what is counted: how far the sum may be off, and what other programs want to move in.
HEADROOM = 0.1
_HELD = 0.3
USUAL_CONTEXT = 8192  # tokens that a sum is for where nobody names a number

IN_WORDS: Mapping[Kind, str] = {
    "full": "every position",
    "window": "sliding windows",
    "state": "recurrent states",
    "other": "mlx-lm's own caches",
}


@dataclass(frozen=True)
class MemorySum:
    """The bytes of a pair at its greatest, part by part.

    weights: of each model, by its name. past: of each model, by its name and the kind of its
    caches. states: what a round adds to recurrent states. passes: the largest that is needed
    beside these for a time: the activations of a pass, or a past that is copied where it grows.
    limit: what this machine has.
    """

    context: int
    weights: Mapping[str, int]
    past: Mapping[tuple[str, Kind], int]
    states: int
    passes: int
    limit: int

    @property
    def needed(self) -> int:
        """All but the head-room."""
        return sum(self.weights.values()) + sum(self.past.values()) + self.states + self.passes

    @property
    def headroom(self) -> int:
        return round(HEADROOM * self.needed)

    @property
    def total(self) -> int:
        return self.needed + self.headroom

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    def rows(self) -> Iterator[tuple[str, int]]:
        """The parts in words, the largest kind first."""
        for name, size in self.weights.items():
            yield f"{name}: weights", size
        for (name, kind), size in self.past.items():
            yield f"{name}: {IN_WORDS[kind]}", size
        if self.states:
            yield "states after each row of a round", self.states
        yield "a pass, and a past that grows", self.passes
        yield f"head-room, {HEADROOM:.0%}", self.headroom

    def as_dict(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "weights": dict(self.weights),
            "past": [
                {"model": name, "caches": kind, "bytes": size}
                for (name, kind), size in self.past.items()
            ],
            "states": self.states,
            "passes": self.passes,
            "headroom": self.headroom,
            "total": self.total,
            "limit": self.limit,
            "fits": self.fits,
        }


def memory_sum(
    target: Footprint,
    drafts: Mapping[str, Footprint],
    limit: int,
    *,
    context: int,
    draft_tokens: int = MAX_AUTO_TOKENS,
) -> MemorySum:
    """The sum for a text of `context` tokens, prompt and answer together.

    Args:
        drafts: by name. draft_tokens: K, the most where it is chosen round by round.
    """
    room = context + MAX_DRAFT_TOKENS
    rows = draft_tokens + 1
    pasts = {"target": target.past(room)}
    # A draft model reads the end of a long text, which spans two windows at most.
    spans = {
        name: context if one.follows else min(context, 2 * WINDOW, one.context or context)
        for name, one in drafts.items()
    }
    pasts |= {name: one.past(spans[name] + MAX_DRAFT_TOKENS) for name, one in drafts.items()}
    return MemorySum(
        context=context,
        weights={"target": target.weights, **{name: one.weights for name, one in drafts.items()}},
        past={(name, kind): size for name, kinds in pasts.items() for kind, size in kinds.items()},
        states=sum(one.states(rows) for one in (target, *drafts.values())),
        passes=_passes(target, drafts, spans, pasts, context, rows),
        limit=limit,
    )


def _passes(
    target: Footprint,
    drafts: Mapping[str, Footprint],
    spans: Mapping[str, int],
    pasts: Mapping[str, Mapping[Kind, int]],
    context: int,
    rows: int,
) -> int:
    """The greatest need beside weights and pasts, of all phases of a text."""
    models = {name: one for name, one in drafts.items() if not one.follows}
    later = sum(sum(pasts[name].values()) for name in models)
    own = sum(pasts["target"].values())
    # The target reads on mlx-lm's caches, and then they are copied: the drafts have no past yet.
    reading = target.read(context) + _reading(target, context) - own - later
    moving = round(_HELD * target.read(context)) - later
    needs = [reading, moving]
    for name, one in models.items():
        past = sum(pasts[name].values())
        needs.append(one.read(spans[name]) + _reading(one, spans[name], CHUNK // 2) - past)
        needs.append(round(_HELD * one.read(spans[name])))
    needs.append(target.passing(rows, context) + target.sampling(rows))
    return max(0, *needs)


def _reading(model: Footprint, tokens: int, piece: int = CHUNK) -> int:
    """The largest pass of a text that is read in pieces; a draft's fit between two rounds."""
    whole, rest = divmod(tokens, piece)
    pieces = [(piece, whole * piece)] if whole else []
    return max(model.passing(*piece) for piece in [*pieces, (rest, tokens)])
