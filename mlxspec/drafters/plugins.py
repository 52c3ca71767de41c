"""Drafters from outside the package, by the names under which they are installed.

A distribution names them in the entry point group `mlxspec.drafters`. An entry point refers to a
callable that takes the target, an mlx-lm model, and its tokenizer, and returns a `Head`, or a
callable that makes a `TextDrafter` for each text. See docs/drafters.md.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mlxspec.drafters.heads.head import Head
from mlxspec.drafters.proposals import TextDrafter
from mlxspec.errors import LoadError
from mlxspec.models.caches.original import Model
from mlxspec.tokens import Tokenizer

GROUP = "mlxspec.drafters"


def installed() -> dict[str, EntryPoint]:
    """The installed drafters, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def made(name: str, target: Model, tokenizer: Tokenizer) -> Head | Callable[[], TextDrafter]:
    """Make the drafter `name` for a target.

    Raises:
        LoadError: it cannot be imported, or refuses the target.
    """
    point = installed()[name]
    try:
        drafter: Any = point.load()(target, tokenizer)
    except Exception as error:  # foreign code, which may raise anything
        raise LoadError(
            f"The drafter {name} ({point.value}) cannot be used: {type(error).__name__}: {error}",
            hint="Ask whoever made it, or leave it out.",
        ) from error
    return drafter  # type: ignore[no-any-return]


def is_head(drafter: Head | Callable[[], TextDrafter] | None) -> bool:
    return hasattr(drafter, "taps")
