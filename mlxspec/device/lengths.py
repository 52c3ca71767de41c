"""How long caches are: what is attended, and what is stored. No MLX."""

from __future__ import annotations


def attended(length: int) -> int:
    """Entries to attend over for `length` that are needed.

    A new number is a new graph to trace, for every K in use, and a larger one is work on entries
    that nobody sees: so it grows by an eighth, in multiples of 128.
    """
    if length <= 64:
        return 64
    step = max(128, length // 8 // 128 * 128)
    return -(-length // step) * step


def reserved(length: int) -> int:
    """Entries to store for `length` that are needed: by a quarter, in multiples of 256."""
    step = max(256, length // 4 // 256 * 256)
    return -(-length // step) * step
