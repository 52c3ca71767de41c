"""Recording the states of a model's recurrences while a pass is built, the model unchanged.

During a pass that may be taken back, the functions that advance a state are wrapped, only for the
thread that builds the graph and only in the model's own modules:

- a *scan* turns rows and a state into rows and the state after them. It is called one row at a
  time instead, and every state that it returns is recorded.
- a *window*, such as a convolution, is fed the rows that a state consists of, and they are
  recorded.

A state that a layer then writes into its cache is recognised as one of those. Any other state is
an error, and `cached_model` then uses a `HostedModel`.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxspec.models.caches.recurrent import RecurrentCache, States, Tail, Trail

Bound = dict[str, Any]  # a call's arguments by name


@dataclass(frozen=True)
class Scan:
    """A function or method that returns (rows, state after them).

    Args:
        module, name: where it is defined.
        state: the argument that is the state before.
        rows: the arguments with a row for each token along `axis`, as its first result has;
            none where it takes a single token.
    """

    module: str
    name: str
    state: str
    rows: tuple[str, ...] = ()
    axis: int = 1


@dataclass(frozen=True)
class Window:
    """A function or method that is given the rows whose last ones are the next state.

    Args:
        module, name: where it is defined.
        rows: a function of its arguments that returns a state's rows and the new ones after them.
        axis: of the rows.
    """

    module: str
    name: str
    rows: Callable[[Bound], mx.array]
    axis: int = 1


class Unrecognised(Exception):
    """A layer wrote a state that no known recurrence made."""


class Recording:
    """The states and rows of one pass's recurrences, in the order of their calls."""

    def __init__(self) -> None:
        self._scanned: dict[int, States] = {}  # by the identity of the last state
        self._windows: list[tuple[mx.array, int]] = []

    def scanned(self, before: mx.array | None, after: mx.array) -> None:
        earlier = self._scanned.get(id(before), States(()))
        self._scanned[id(after)] = earlier.then(States((after,)))  # which also keeps it alive

    def fed(self, rows: mx.array, axis: int) -> None:
        self._windows.append((rows, axis))

    def settle(self, caches: Sequence[RecurrentCache], rows: int) -> None:
        """Give every cache of a pass over `rows` rows its trails.

        Raises:
            Unrecognised: a state is of unknown origin.
        """
        for cache in caches:
            cache.trails = tuple(self._trail(state, rows) for state in cache.states)

    def _trail(self, state: mx.array, rows: int) -> Trail:
        states = self._scanned.get(id(state))
        if states is not None and states.last is state and len(states.after) == rows:
            return states
        for i, (fed, axis) in enumerate(self._windows):
            width = state.shape[axis] if axis < state.ndim else 0
            shape = list(state.shape)
            if width:
                shape[axis] = width + rows
            if width and list(fed.shape) == shape and fed.dtype == state.dtype:
                # In the order of the calls: several convolutions of a layer may look the same.
                del self._windows[i]
                return Tail(fed, width, axis)
        if rows == 1:  # after a single row, any state is the one after it
            return States((state,))
        raise Unrecognised


@dataclass(frozen=True)
class Hook:
    """A place where a recurrence is called from."""

    owner: Any
    attribute: str
    original: Callable[..., Any]
    recurrence: Scan | Window

    def wrapped(self, record: Recording) -> Callable[..., Any]:
        builder = threading.get_ident()
        signature = inspect.signature(self.original)
        watch = _stepwise if isinstance(self.recurrence, Scan) else _noted

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != builder:
                return self.original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            return watch(self.original, bound, self.recurrence, record)

        return call


def hooks_of(model: Any, recurrences: Sequence[Scan | Window]) -> list[Hook]:
    """The places where the layers of `model` call any of `recurrences`."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    places = [sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules]
    hooks = []
    for recurrence in recurrences:
        defined = sys.modules.get(recurrence.module)
        owner, _, method = recurrence.name.rpartition(".")
        if owner:
            found = [cls for cls in [getattr(defined, owner, None)] if cls in classes]
        else:
            original = getattr(defined, method, None)
            found = [place for place in places if vars(place).get(method) is original is not None]
        owners = dict.fromkeys(found)  # several layers may share one
        hooks += [Hook(one, method, getattr(one, method), recurrence) for one in owners]
    return hooks


_LOCK = threading.RLock()  # a function is wrapped by one thread at a time


@contextmanager
def recording(hooks: Sequence[Hook]) -> Iterator[Recording]:
    """Record the recurrences of a model while a pass is built."""
    record = Recording()
    with _LOCK:
        for hook in hooks:
            setattr(hook.owner, hook.attribute, hook.wrapped(record))
        try:
            yield record
        finally:
            for hook in hooks:
                setattr(hook.owner, hook.attribute, hook.original)


def _noted(
    original: Callable[..., Any], bound: inspect.BoundArguments, window: Any, record: Recording
) -> Any:
    if all(value is not None for value in bound.arguments.values()):
        record.fed(window.rows(bound.arguments), window.axis)
    return original(*bound.args, **bound.kwargs)


def _stepwise(
    original: Callable[..., Any], bound: inspect.BoundArguments, scan: Any, record: Recording
) -> Any:
    given = bound.arguments
    length = given[scan.rows[0]].shape[scan.axis] if scan.rows else 1
    pieces = {
        name: mx.split(given[name], length, axis=scan.axis) if length > 1 else [given[name]]
        for name in scan.rows
    }
    outputs = []
    for i in range(length):
        given.update({name: parts[i] for name, parts in pieces.items()})
        output, after = original(*bound.args, **bound.kwargs)
        record.scanned(given[scan.state], after)
        outputs.append(output)
        given[scan.state] = after
    joined = mx.concatenate(outputs, axis=scan.axis) if length > 1 else outputs[0]
    return joined, after
