"""Keyed random numbers: the same seed, stream and position give the same ones, in any order.

A round draws from a key made of its sequence's seed, a stream and a position, and changes no
state. So its random numbers depend neither on the other sequences in the batch nor on how many
tokens were proposed before. Two draws share a key only on purpose.
"""

from __future__ import annotations

import mlx.core as mx

# Streams. The target's noise is keyed by the position of the token that it chooses; every other
# stream by the position where the round begins, because several rounds may draft one position.
TARGET_NOISE = 0
ACCEPT_NOISE = 1
DRAFT_NOISE = 2  # plus the index of the draft step


def row_key(seed: int) -> mx.array:
    """The key of one sequence, uint32 [2]; adjacent seeds give unrelated keys."""
    return mx.random.split(mx.random.key(seed), 1)[0]


def keys_of(rows: mx.array, stream: mx.array | int, positions: mx.array) -> mx.array:
    """A key for each stream and position.

    Args:
        rows: uint32 [B, 2], the sequences' keys.
        stream, positions: int32, broadcast to [B, N].

    Returns:
        uint32 [B, N, 2].
    """
    stream, positions = mx.broadcast_arrays(mx.array(stream), positions)
    parts = [stream.astype(mx.uint32), positions.astype(mx.uint32)]
    return rows[:, None] + mx.stack(parts, axis=-1)


def uniform(keys: mx.array, count: int) -> mx.array:
    """`count` numbers in (0, 1) for each of the keys [B, N, 2]: float32 [B, N, count]."""
    drawn = mx.vmap(lambda key: mx.random.uniform(shape=(count,), key=key))(keys.reshape(-1, 2))
    # Never 0, which MLX draws once in 2^32: a token of probability 0 would be accepted.
    return mx.maximum(drawn, 2.0**-34).reshape(*keys.shape[:-1], count)


def gumbel(keys: mx.array, vocabulary: int) -> mx.array:
    """Gumbel noise, float32 [B, N, V]: argmax(log w + noise) is a draw from norm(w).

    Large noise decides the argmax. Here it comes from u near 0, where float32 is dense;
    -log(-log u) would take it from u near 1, where float32 has only steps of 2^-24.
    """
    return -mx.log(-mx.log1p(-uniform(keys, vocabulary)))
