"""The angles of rotary embeddings, computed once for all layers of a pass on a CPU.

There MLX builds every `mx.fast.rope` out of a dozen operations: positions, frequencies, sines and
cosines, twice a layer, and all layers have the same ones. A GPU has one kernel for all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import log
from typing import Any

import mlx.core as mx

from mlxspec.device.kernels import on_cpu

_LOCK = threading.RLock()  # the function is replaced by one thread at a time


@contextmanager
def shared_angles() -> Iterator[None]:
    """Let the passes that this thread builds within the block share their angles.

    What a layer gets is the same to the last bit. Does nothing on a GPU.
    """
    if not on_cpu():
        yield
        return
    with _LOCK:
        original: Any = mx.fast.rope
        fast: Any = mx.fast
        fast.rope = _Rotary(original)
        try:
            yield
        finally:
            fast.rope = original


class _Rotary:
    """`mx.fast.rope` for the thread that made it; any other one gets the original."""

    def __init__(self, original: Callable[..., mx.array]) -> None:
        self._original = original
        self._builder = threading.get_ident()
        self._angles: dict[Any, tuple[mx.array, mx.array]] = {}
        self._kept: list[Any] = []  # what keys name by identity

    def __call__(
        self,
        x: mx.array,
        dims: int,
        *,
        traditional: bool,
        base: float | None,
        scale: float,
        offset: int | mx.array,
        freqs: mx.array | None = None,
        stream: Any = None,
    ) -> mx.array:
        if threading.get_ident() != self._builder or traditional or x.ndim != 4 or stream:
            return self._original(
                x,
                dims,
                traditional=traditional,
                base=base,
                scale=scale,
                offset=offset,
                freqs=freqs,
                stream=stream,
            )
        key = (x.shape[2], x.dtype, dims, base, scale, _named(offset), _named(freqs))
        if key not in self._angles:
            self._kept += [offset, freqs]
            self._angles[key] = _angles(x, dims, base, scale, offset, freqs)
        cosines, sines = self._angles[key]
        first, second = x[..., : dims // 2], x[..., dims // 2 : dims]
        turned = [first * cosines - second * sines, first * sines + second * cosines]
        rest = [x[..., dims:]] if dims < x.shape[-1] else []
        return mx.concatenate(turned + rest, axis=-1)


def _named(one: Any) -> Any:
    return id(one) if isinstance(one, mx.array) else one


def _angles(
    x: mx.array,
    dims: int,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Cosines and sines, [B or 1, 1, N, dims/2], by MLX's own steps."""
    start = offset if isinstance(offset, mx.array) else mx.array(offset)
    start = start[:, None, None] if start.size > 1 else start
    places = (mx.arange(x.shape[2], dtype=mx.float32) + start) * scale
    if freqs is not None:
        turns = 1 / freqs
    else:
        assert base is not None
        exponents = mx.arange(0, -(dims // 2), -1, dtype=mx.float32)
        turns = mx.exp(exponents * (log(base) / (dims // 2)))
    angles = places[..., None] * turns
    return mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)
