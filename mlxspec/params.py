"""How the next token is chosen: what a caller asks for. Needs no MLX."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from mlxspec.errors import UsageError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token; above 0 samples.
        top_p: keep the smallest set of tokens whose probability reaches this; 0 or 1 is off.
        top_k: keep this many of the most likely tokens; 0 is off.
        min_p: keep tokens at least this times as likely as the most likely one; 0 is off.
        seed: of the random numbers; None draws one.

    Raises:
        UsageError: when a value is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(
            "temperature",
            self.temperature,
            0 <= self.temperature < float("inf"),
            "finite, and 0 or more",
        )
        _require("top_p", self.top_p, 0 <= self.top_p <= 1, "between 0 and 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        _require("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _require("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "0 to 2^64 - 1")

    @property
    def method(self) -> Method:
        if self.temperature == 0:
            return Method(greedy=True)
        return Method(
            greedy=False, top_p=0 < self.top_p < 1, min_p=self.min_p > 0, top_k=self.top_k
        )

    def with_seed(self) -> SamplingParams:
        """These parameters with a seed, drawn where there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))


@dataclass(frozen=True)
class Method:
    """Which steps a distribution goes through: what of the parameters shapes the graph."""

    greedy: bool
    top_p: bool = False
    min_p: bool = False
    top_k: int = 0


def _require(name: str, value: float | None, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value}.", hint=f"It must be {expected}.")
