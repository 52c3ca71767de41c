"""From logits to the distribution that is sampled: one function for p and for q.

Temperature, top-p, min-p and top-k mean what they mean in mlx-lm's `make_sampler`: the filters
act on the untempered distribution, in that order, and the temperature on what they leave.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlxspec.params import Method, SamplingParams


class Knobs(NamedTuple):
    """The parameters that are data: arrays of shape [B], so that a new value needs no new graph."""

    temperature: mx.array
    top_p: mx.array
    min_p: mx.array


def knobs_of(params: SamplingParams, batch: int) -> Knobs:
    """The parameters of `batch` sequences that are sampled alike."""
    # Below this a division by it leaves float32; the distribution is a point long before.
    temperature = max(params.temperature, 1e-30)
    values = (temperature, params.top_p, params.min_p)
    return Knobs(*(mx.full((batch,), value, mx.float32) for value in values))


def log_probs(logits: mx.array, method: Method, knobs: Knobs) -> mx.array:
    """Log-probabilities, float32 [B, N, V], of the distribution that is sampled.

    Args:
        logits: [B, N, V], any floating dtype.
        method: not greedy.
        knobs: one row of values per sequence.
    """
    temperature, top_p, min_p = (knob[:, None, None] for knob in knobs)
    x = _normalised(logits.astype(mx.float32))
    if method.top_p:
        x = _keep_top_p(x, top_p)
    if method.min_p:
        x = _keep(x, x >= mx.max(x, axis=-1, keepdims=True) + mx.log(min_p))
    if 0 < method.top_k < x.shape[-1]:
        x = _keep(x, x >= mx.min(mx.topk(x, method.top_k, axis=-1), axis=-1, keepdims=True))
    return _normalised(x / temperature)


def _keep_top_p(x: mx.array, top_p: mx.array) -> mx.array:
    # Tokens leave while those above them alone reach top_p; the most likely one always stays.
    ascending = mx.sort(x, axis=-1)
    above = mx.cumsum(mx.exp(ascending), axis=-1, reverse=True, inclusive=False)
    dropped = mx.sum(above >= top_p, axis=-1, keepdims=True)
    dropped = mx.minimum(dropped, x.shape[-1] - 1)
    return _keep(x, x >= mx.take_along_axis(ascending, dropped, axis=-1))


def _keep(x: mx.array, kept: mx.array) -> mx.array:
    return mx.where(kept, x, -mx.inf)


def _normalised(x: mx.array) -> mx.array:
    return x - mx.logsumexp(x, axis=-1, keepdims=True)
