"""Pairs of shapes, as people write them, and how much of their targets fits into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxspec.decode.engine import Engine
from mlxspec.defaults import MODEL
from mlxspec.device.memory import limit
from mlxspec.errors import MlxspecError, UsageError
from mlxspec.models import shapes
from mlxspec.models.footprint import Footprint, footprint
from mlxspec.models.shapes import PACKINGS, UNPACKED, Shape
from mlxspec.pairs.contents import CONFIG, read_json
from mlxspec.pairs.folders import located
from mlxspec.pairs.hub import Repository, download
from mlxspec.pairs.memory import USUAL_CONTEXT, MemorySum, memory_sum
from mlxspec.pairs.pull import gigabytes
from mlxspec.params import KVQuantization

MEASURED_CONTEXT, MEASURED_TOKENS = 256, 31  # that a measurement of costs needs, and its largest K
_SEEDS = {"target": 1, MODEL: 2}


@dataclass(frozen=True)
class ShapePair:
    """A target, and a draft unless nothing drafts.

    depths: how many layers of the target are measured: all of them, or two numbers of fewer, from
    which the whole follows. needed, limit: bytes of the whole, and of this machine.
    """

    target: Shape
    draft: Shape | None
    depths: tuple[int, ...]
    needed: int
    limit: int

    @property
    def name(self) -> str:
        return str(self.target) if self.draft is None else f"{self.target}+{self.draft}"

    @property
    def is_whole(self) -> bool:
        return self.depths == (self.target.layers,)

    @property
    def words(self) -> str:
        """What is measured in place of the whole; empty where that is measured itself."""
        if self.is_whole:
            return ""
        few, more = self.depths
        return (
            f"{self.target} needs {gigabytes(self.needed)}, and this machine has "
            f"{gigabytes(self.limit)}: targets with {few} and with {more} of its "
            f"{self.target.layers} layers are measured, and every time is extended along the line "
            "through both"
        )

    def engines(
        self, *, compiled: bool | None = True, kv: KVQuantization | None = None
    ) -> dict[int, Engine]:
        """Engines with random weights, by the number of the target's layers.

        Args:
            compiled, kv: see `Engine`.
        """
        draft = None if self.draft is None else self.draft.made(_SEEDS[MODEL])
        targets = {one: self.target.with_layers(one).made(_SEEDS["target"]) for one in self.depths}
        return {
            depth: Engine(target, draft, compiled=compiled, kv=kv)
            for depth, target in targets.items()
        }

    def memory(self, context: int = USUAL_CONTEXT) -> tuple[MemorySum, MemorySum]:
        """The memory sums of a text with the pair, and with the target alone."""
        target, drafts = _print_of(self.target), _drafts(self.draft)
        both = memory_sum(target, drafts, self.limit, context=context)
        return both, memory_sum(target, {}, self.limit, context=context, draft_tokens=0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        models = {"target": self.target, "draft": self.draft}
        return {
            "name": self.name,
            **{
                role: None
                if one is None
                else {
                    "name": str(one),
                    "layers": one.layers,
                    "parameters": one.parameters,
                    "bytes": one.size,
                }
                for role, one in models.items()
            },
            "measured_layers": list(self.depths),
            "needed": self.needed,
            "limit": self.limit,
            "in_place_of_the_whole": self.words,
        }


def pair_of(text: str, *, within: int | None = None) -> ShapePair:
    """The pair that a text such as `llama-8b:4bit+llama-1b:4bit` names. Nothing is allocated.

    Args:
        text: a target, or target+draft: names of built-in shapes, folders or repositories, of which
            config.json alone is read; behind each perhaps how its weights are packed.
        within: bytes that all must fit into; None is what this machine has.

    Raises:
        UsageError: it names no shape. LoadError: a configuration cannot be had, or used.
        MlxspecError: not even a few layers of the target fit.
    """
    target, *drafts = [shape_of(one) for one in _split(text)]
    if len(drafts) > 1:
        raise UsageError(
            f"{text!r} names {len(drafts) + 1} shapes.", hint="Give a target, or TARGET+DRAFT."
        )
    draft = drafts[0] if drafts else None
    available = limit() if within is None else within
    whole = _measuring(target, draft, available)
    if whole.fits:
        return ShapePair(target, draft, (target.layers,), whole.total, available)
    depths = _few_layers(target, draft, whole)
    return ShapePair(target, draft, depths, whole.total, available)


def shape_of(text: str) -> Shape:
    """A built-in shape, or that of a folder or a repository, which needs its config.json alone.

    Raises:
        UsageError: there is no such shape. LoadError: the configuration cannot be had.
    """
    name, colon, packing = text.rpartition(":")
    if not colon or "/" in packing or (packing not in _packings() and Path(text).exists()):
        name, packing = text, ""
    elif packing not in _packings():
        raise UsageError(
            f"{text!r}: weights cannot be packed as {packing!r}.",
            hint=f"Write one of {', '.join(_packings())} behind the colon.",
        )
    name = name.strip()
    if not ("/" in name or name.startswith((".", "~")) or Path(name).exists()):
        return shapes.named(name, packing)
    at = located(name)
    if isinstance(at, Repository):
        at = download(at, name, (CONFIG,))
    return Shape(name, read_json(at if at.is_file() else at / CONFIG), packing)


def _packings() -> tuple[str, ...]:
    return (*PACKINGS, *UNPACKED)


def _split(text: str) -> list[str]:
    if Path(text).exists():  # a folder with a plus in its name
        return [text]
    return text.split("+")


def _few_layers(target: Shape, draft: Shape | None, whole: MemorySum) -> tuple[int, int]:
    """Two numbers of layers of which both targets fit side by side.

    The smaller one has every kind of layer. Those between both, and those that are missing, are
    whole periods of the target's pattern.

    Raises:
        MlxspecError: none do.
    """
    head, period = target.period()
    few = head + period + (target.layers - head) % period

    least = [few + count * period for count in (1, 2)]
    if least[0] >= target.layers:
        raise _too_large(target, draft, whole, None)
    first, second = (_side_by_side(target, draft, whole, few, more) for more in least)
    if first > whole.limit:
        raise _too_large(target, draft, whole, first)
    # Every further period takes as much as the second one.
    further = int((whole.limit - first) // max(second - first, 1))
    most = (target.layers - 1 - few) // period
    return few, few + period * min(1 + further, most)


def _side_by_side(target: Shape, draft: Shape | None, whole: MemorySum, few: int, more: int) -> int:
    """Bytes of what two targets of so many layers need."""
    small, large = (_measuring(target.with_layers(one), draft, whole.limit) for one in (few, more))
    return large.total + small.weights["target"]


def _too_large(
    target: Shape, draft: Shape | None, whole: MemorySum, least: int | None
) -> MlxspecError:
    both = str(target) if draft is None else f"{target} with {draft}"
    few = f" ({gigabytes(least)} with a few of its layers)" if least is not None else ""
    return MlxspecError(
        f"{both} needs {gigabytes(whole.total)}{few}, and this machine has "
        f"{gigabytes(whole.limit)}.",
        hint="Take a smaller shape, or fewer bits.",
    )


def _measuring(target: Shape, draft: Shape | None, available: int) -> MemorySum:
    """What a measurement of costs needs."""
    return memory_sum(
        _print_of(target),
        _drafts(draft),
        available,
        context=MEASURED_CONTEXT,
        draft_tokens=MEASURED_TOKENS,
    )


def _drafts(draft: Shape | None) -> Mapping[str, Footprint]:
    return {} if draft is None else {MODEL: _print_of(draft)}


def _print_of(shape: Shape) -> Footprint:
    config: dict[str, Any] = dict(shape.config)
    return footprint(config, shape.size)
