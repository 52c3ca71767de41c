"""From a prompt to the state before its first round."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxspec.errors import OutOfMemory
from mlxspec.network import Network
from mlxspec.noise import row_key
from mlxspec.pairs import MAX_DRAFT_TOKENS
from mlxspec.params import SamplingParams
from mlxspec.prefill import Note, Progress, Reading, prefill
from mlxspec.round import RoundState
from mlxspec.sampling import NO_TOKEN, Sampler, knobs_of
from mlxspec.session import reserved


def opened(
    networks: Sequence[Network],
    tokens: Sequence[int],
    sampling: SamplingParams,
    *,
    sampler: Sampler | None,
    capacity: int,
    progress: Progress | None,
    note: Note | None,
) -> RoundState:
    """The state of one sequence before its first round.

    Args:
        networks: the target, and a draft if there is one.
        sampler: says how much of the text the rounds look back on; None is not at all.
        capacity: entries that the caches have room for, at least.
        note: called with what a person should know, such as that the draft was left out because
            memory would not hold both.
    """
    # The first round feeds the target the last token, and the draft the last two.
    readings = [Reading(network, tokens[: -1 - i]) for i, network in enumerate(networks)]
    try:
        caches = prefill(readings, progress=progress, note=note)
    except OutOfMemory:
        if len(readings) == 1:
            raise
        caches = prefill(readings[:1], progress=progress, note=note)
        if note is not None:
            note("memory does not hold the draft's cache: going on without the draft")
    capacity = max(capacity, reserved(len(tokens) + MAX_DRAFT_TOKENS))
    layers = [
        network.adopt(cache, len(read), capacity)
        for (network, read), cache in zip(readings, caches, strict=False)
    ]
    seed = sampling.with_seed().seed
    assert seed is not None
    return RoundState(
        position=mx.array([len(tokens) - 1], mx.int32),
        last_two=mx.array([[tokens[max(len(tokens) - 2, 0)], tokens[-1]]], mx.int32),
        recent=_recent(tokens, sampler),
        keys=row_key(seed)[None],
        knobs=knobs_of(sampling, batch=1, vocabulary=networks[0].vocabulary),
        target=layers[0],
        draft=layers[1] if len(layers) > 1 else [],
    )


def _recent(tokens: Sequence[int], sampler: Sampler | None) -> mx.array:
    """The text, or as much of its end as the rounds look back on: int32 [1, W]."""
    if sampler is not None and sampler.sees_whole_text:
        return mx.array([list(tokens)], mx.int32)
    window = sampler.context if sampler is not None else 0
    last = list(tokens[max(len(tokens) - window, 0) :])
    return mx.array([[NO_TOKEN] * (window - len(last)) + last], mx.int32).reshape(1, window)
