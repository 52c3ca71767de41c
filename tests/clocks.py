"""Models whose passes take as long as a made-up clock says, so that no test has to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache


class Clock:
    """Seconds that pass only where somebody says so, and a little with every look."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-6
        return self.now_s


class Slowed(nn.Module):
    """A model whose passes over some rows take as long as `seconds` says, by the clock."""

    def __init__(self, inner: Any, clock: Clock, seconds: Callable[[int], float]) -> None:
        super().__init__()
        self.inner = inner
        self._clock = clock
        self._seconds = seconds

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self._clock.now_s += self._seconds(tokens.shape[1])
        return self.inner(tokens, cache=cache)

    def make_cache(self) -> list[Any]:
        return make_prompt_cache(self.inner)


def growing(first_s: float, row_s: float) -> Callable[[int], float]:
    return lambda rows: first_s + (rows - 1) * row_s
