"""What modules inside a model give or get in a pass, read without changing the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from mlxspec.errors import UnsupportedModel
from mlxspec.models.caches.original import Model

_LOCK = threading.RLock()  # a module is replaced by one thread at a time

INPUT = ":input"  # behind a name: what the module is given, in place of what it returns

Features = dict[str, mx.array]


class Taps:
    """Watches modules of a model by name, such as `model.norm` or `model.layers.3`.

    A name that ends in INPUT is that of the module's first argument, others are of its output.

    Raises:
        UnsupportedModel: the model has no such module.
    """

    def __init__(self, model: Model, names: Sequence[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._places = {name: _place(model, name.removesuffix(INPUT)) for name in self.names}

    @contextmanager
    def watching(self) -> Iterator[Features]:
        """Collect each module's output, by name, from the passes that this thread builds."""
        seen: Features = {}
        if not self._places:
            yield seen
            return
        with _LOCK:
            modules = []
            for name, (owner, key) in self._places.items():
                modules.append((owner, key, owner[key]))
                owner[key] = _Watched(owner[key], name, seen)
            try:
                yield seen
            finally:
                for owner, key, module in reversed(modules):  # one may be watched twice
                    owner[key] = module


class _Watched:
    """A stand-in for a module: it behaves like the module, and records its output or input."""

    def __init__(self, module: Any, name: str, seen: Features) -> None:
        self._module = module
        self._name = name
        self._seen = seen
        self._builder = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._module(*args, **kwargs)
        if threading.get_ident() == self._builder:
            value = args[0] if self._name.endswith(INPUT) else output
            self._seen[self._name] = value[0] if isinstance(value, tuple) else value
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _place(model: Model, name: str) -> tuple[Any, Any]:
    """The container of a module, which is a module or a list, and its key there."""
    owner: Any = None
    inner: Any = model
    key: Any = ""
    for part in name.split("."):
        owner, key = inner, int(part) if part.isdigit() else part
        try:
            inner = owner[key]
        except (KeyError, IndexError, TypeError) as error:
            raise UnsupportedModel(
                f"{type(model).__module__} has no module {name!r}, which a drafter asks for.",
                hint="Use a target that the drafter was made for.",
            ) from error
    return owner, key
