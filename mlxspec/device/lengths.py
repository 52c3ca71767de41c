"""Lengths of caches: the entries attended to, and the entries stored. No MLX."""

from __future__ import annotations


def attended(length: int) -> int:
    """The number of entries to attend over when `length` are needed.

    A new number means a new graph to trace for every K in use, and a larger one means work on
    masked entries. So it grows by an eighth, in multiples of 128.
    """
    if length <= 64:
        return 64
    step = max(128, length // 8 // 128 * 128)
    return -(-length // step) * step


def reserved(length: int) -> int:
    """The number of entries to store when `length` are needed.

    It grows by a quarter, in multiples of 256.
    """
    step = max(256, length // 4 // 256 * 256)
    return -(-length // step) * step
