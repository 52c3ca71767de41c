"""From a text to the state before its next round: the target reads it, a draft when it is asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxspec.decode.prompt_cache import TARGET, PromptCache
from mlxspec.decode.round import RoundState
from mlxspec.defaults import MAX_DRAFT_TOKENS
from mlxspec.device import lengths
from mlxspec.drafters.graph import Head, Past
from mlxspec.models.cached_model import CachedModel
from mlxspec.models.prefill import Begin, Note, Progress, Reading, afresh, prefill
from mlxspec.models.taps import Features, Taps
from mlxspec.params import SamplingParams
from mlxspec.sampling.noise import row_key
from mlxspec.sampling.sampler import NO_TOKEN, Sampler, knobs_of


class Reader:
    """Reads the text of one session.

    Args:
        target: its cached. drafts: those of the draft models, by name. heads: and the heads.
        sampler: says how much of the text the rounds look back on; None is not at all.
        capacity: entries that the target's caches have room for, at least.
        note: called with what a person should know.
        cache: a file to begin from, and to keep the prompt in.
    """

    def __init__(
        self,
        target: CachedModel,
        drafts: Mapping[str, CachedModel],
        sampling: SamplingParams,
        *,
        heads: Mapping[str, Head] | None = None,
        sampler: Sampler | None = None,
        capacity: int = 0,
        progress: Progress | None = None,
        note: Note | None = None,
        cache: PromptCache | None = None,
    ) -> None:
        self._target = target
        self._drafts = dict(drafts)
        self._heads = dict(heads or {})
        self._taps = Taps(target.model, [tap for head in self._heads.values() for tap in head.taps])
        self._sampling = sampling.with_seed()
        self._sampler = sampler
        self._capacity = capacity
        self._progress = progress
        self._note = note or (lambda _: None)
        self._cache = cache
        self._read_s = 0.0

    def state(self, tokens: Sequence[int]) -> RoundState:
        """The state of one sequence before its next round; no draft has read it yet.

        Raises:
            OutOfMemory: the target's caches do not fit.
        """
        # The next round feeds the target the last token.
        read = tokens[:-1]
        started = time.perf_counter()
        caches, features = self._target_read(Reading(self._target, read))
        self._read_s = time.perf_counter() - started
        capacity = max(self._capacity, lengths.reserved(len(tokens) + MAX_DRAFT_TOKENS))
        assert self._sampling.seed is not None
        return RoundState(
            position=mx.array([len(tokens) - 1], mx.int32),
            last_two=mx.array([[tokens[max(len(tokens) - 2, 0)], tokens[-1]]], mx.int32),
            recent=_recent(tokens, self._sampler),
            keys=row_key(self._sampling.seed)[None],
            knobs=knobs_of(self._sampling, batch=1, vocabulary=self._target.vocabulary),
            target=self._target.adopt(caches, len(read), capacity),
            drafts={},
            # Without a token that was read there are no features to begin with.
            heads={
                name: head.begin(mx.array([list(read)], mx.int32), features, capacity)
                for name, head in self._heads.items()
                if read
            },
        )

    def draft(self, name: str, tokens: Sequence[int], start: int) -> Past:
        """What a draft model knows once it has read a text from `start` on.

        Its next round feeds it the last two tokens.

        Raises:
            OutOfMemory: its caches do not fit.
        """
        cached = self._drafts[name]
        read = tokens[start:-2]
        reading = Reading(cached, read)
        caches, _ = prefill(reading, begin=self._begin(name, start), note=self._note)
        if self._cache is not None:
            self._cache.has_read(name, reading, caches, start)
        layers = cached.adopt(caches, len(read), lengths.reserved(len(read) + MAX_DRAFT_TOKENS))
        return Past(layers, mx.array([start], mx.int32))

    @property
    def keeps(self) -> bool:
        """Whether there is a file that `keep` may write."""
        return self._cache is not None

    def keep(self) -> None:
        """Write what was read so far to the file, once."""
        if self._cache is not None:
            self._cache.keep(self._note)

    def _target_read(self, reading: Reading) -> tuple[list[Any], Features]:
        # A file has no features: with heads the target reads it all.
        begin = self._begin(TARGET) if not self._heads else afresh
        caches, features = prefill(
            reading, begin=begin, progress=self._progress, note=self._note, taps=self._taps
        )
        if self._cache is not None and not self._heads:
            self._cache.has_read(TARGET, reading, caches)
        return caches, features

    def _begin(self, name: str, start: int = 0) -> Begin:
        """Where a model that reads a text from `start` on begins."""
        cache, note = self._cache, self._note
        if cache is None:
            return afresh
        return lambda reading: cache.begun(name, reading, note, start)

    def draft_seconds(self, name: str) -> float:
        """What reading the text is likely to take a draft model, from what it took the target.

        By the bytes of their weights: both read with all the power that there is.
        """
        return self._read_s * _nbytes(self._drafts[name]) / _nbytes(self._target)


def _nbytes(cached: CachedModel) -> int:
    arrays: dict[str, mx.array] = dict(tree_flatten(cached.model.parameters()))
    return sum(array.nbytes for array in arrays.values())


def _recent(tokens: Sequence[int], sampler: Sampler | None) -> mx.array:
    """The text, or as much of its end as the rounds look back on: int32 [1, W]."""
    if sampler is not None and sampler.sees_whole_text:
        return mx.array([list(tokens)], mx.int32)
    window = sampler.context if sampler is not None else 0
    last = list(tokens[max(len(tokens) - window, 0) :])
    return mx.array([[NO_TOKEN] * (window - len(last)) + last], mx.int32).reshape(1, window)
