"""From logits to the sampled distribution, in the same way for p and q.

Penalties, biases and filters mean what they mean in mlx-lm's `make_logits_processors` and
`make_sampler`, in its order: bias, repetition, presence, frequency; then, on the untempered
distribution, top-p, min-p, XTC, top-k; and the temperature on what they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxspec.params import DEFAULT_THRESHOLD, Method, SamplingParams

# As in mlx-lm: (tokens int [n], logits [1, V]) to logits [1, V]. It sees proposals that may
# be rejected, so its result must depend on its arguments alone.
Processor = Callable[[mx.array, mx.array], mx.array]

NO_TOKEN = -1  # before the first token of a text


class Knobs(NamedTuple):
    """The parameters that are data: float32 arrays [B], so that a new value needs no new graph.

    bias: float32 [B, V], or [B, 0] where there is none.
    """

    temperature: mx.array
    top_p: mx.array
    min_p: mx.array
    xtc_probability: mx.array
    xtc_threshold: mx.array
    repetition: mx.array
    presence: mx.array
    frequency: mx.array
    threshold: mx.array
    bias: mx.array


def knobs_of(params: SamplingParams, batch: int, vocabulary: int) -> Knobs:
    """The knobs of `batch` sequences with the same sampling parameters.

    A value that turns a step off makes it the identity, because another row may use the step.

    Args:
        vocabulary: V; biases of ids past it have no effect.
    """
    threshold = params.acceptance_threshold
    values = (
        # Dividing by less would overflow float32; the distribution is a point mass long before.
        max(params.temperature, 1e-30),
        # A cumulative sum may round to 1 before the last token.
        params.top_p if 0 < params.top_p < 1 else 2,
        params.min_p,
        params.xtc_probability,
        params.xtc_threshold,
        params.penalties.repetition or 1,
        params.penalties.presence,
        params.penalties.frequency,
        DEFAULT_THRESHOLD if threshold is None else threshold,
    )
    known = {token: value for token, value in params.logit_bias.items() if token < vocabulary}
    bias = mx.zeros((batch, vocabulary if params.logit_bias else 0), mx.float32)
    if known:
        bias[:, mx.array(list(known))] = mx.array(list(known.values()), mx.float32)
    columns = [mx.full((batch,), value, mx.float32) for value in values]
    return Knobs._make([*columns, bias])


class Sampler:
    """Turns a model's logits into scores, and scores into the sampled distribution.

    Args:
        method: the steps that apply.
        vocabulary: V, the size of the target's vocabulary.
        processors: the caller's logits processors, applied before every other step and to one
            sequence at a time; with any, `recent` is the whole text.
    """

    def __init__(
        self, method: Method, vocabulary: int, processors: Sequence[Processor] = ()
    ) -> None:
        self.method = method
        self.vocabulary = vocabulary
        self._processors = tuple(processors)

    @property
    def sees_whole_text(self) -> bool:
        """Whether `recent` must be exactly the text, so that its length shapes the graph."""
        return bool(self._processors)

    @property
    def context(self) -> int:
        """The number of `recent` tokens needed, where the whole text is not."""
        return self.method.windows.longest

    def scores(self, logits: mx.array, recent: mx.array, knobs: Knobs) -> mx.array:
        """Logits after processors, bias and penalties: float32 [B, N, V'].

        Args:
            logits: [B, N, V'], of any floating dtype, over the first V' tokens.
            recent: int32 [B, W + N - 1] tokens: row i of the logits follows the first W + i.
        """
        scores = logits.astype(mx.float32)
        if self._processors:
            scores = self._processed(scores, recent)
        size = scores.shape[-1]
        if self.method.bias:
            scores = scores + knobs.bias[:, None, :size]
        windows = self.method.windows
        if windows.repetition:
            penalty = knobs.repetition[:, None, None]
            scaled = mx.where(scores < 0, scores * penalty, scores / penalty)
            seen = _counts(recent, windows.repetition, scores.shape) > 0
            scores = mx.where(seen, scaled, scores)
        if windows.presence:
            seen = _counts(recent, windows.presence, scores.shape) > 0
            scores = scores - knobs.presence[:, None, None] * seen
        if windows.frequency:
            times = _counts(recent, windows.frequency, scores.shape)
            scores = scores - knobs.frequency[:, None, None] * times
        return scores

    def log_probs(self, scores: mx.array, knobs: Knobs) -> mx.array:
        """Log-probabilities, float32 [B, N, V'], of the distribution that is sampled.

        Args:
            scores: as `scores` returns them; not for a greedy method.
        """
        method = self.method
        x = normalised(scores)
        if method.top_p:
            x = _keep_top_p(x, knobs.top_p[:, None, None])
        if method.min_p:
            floor = mx.max(x, axis=-1, keepdims=True) + mx.log(knobs.min_p[:, None, None])
            x = _keep(x, x >= floor)
        if not method.xtc:
            return self._tempered(x, knobs)
        # XTC applies to each token by chance, so the sampled distribution is a mixture.
        share = knobs.xtc_probability[:, None, None]
        without, with_it = x, _keep(x, ~self._is_top_choice(x, knobs))
        return mx.logaddexp(
            mx.log1p(-share) + self._tempered(without, knobs),
            mx.log(share) + self._tempered(with_it, knobs),
        )

    def _tempered(self, x: mx.array, knobs: Knobs) -> mx.array:
        if 0 < self.method.top_k < x.shape[-1]:
            least = mx.min(mx.topk(x, self.method.top_k, axis=-1), axis=-1, keepdims=True)
            x = _keep(x, x >= least)
        return normalised(x / knobs.temperature[:, None, None])

    def _is_top_choice(self, x: mx.array, knobs: Knobs) -> mx.array:
        """Boolean [B, N, V']: the tokens that XTC drops.

        It drops those that are likelier than another one above the threshold.
        """
        p = mx.softmax(x, axis=-1)
        reaches = p > knobs.xtc_threshold[:, None, None]
        left_out = p > mx.min(mx.where(reaches, p, mx.inf), axis=-1, keepdims=True)
        special = self.method.xtc_special_tokens
        if special:
            is_special = mx.any(mx.arange(x.shape[-1]) == mx.array(special)[:, None], axis=0)
            left_out = left_out & ~is_special
        return left_out

    def _processed(self, scores: mx.array, recent: mx.array) -> mx.array:
        rows, size = scores.shape[1], scores.shape[-1]
        before = recent.shape[1] - rows + 1
        # A processor expects the target's vocabulary, even where a draft's is smaller.
        missing = self.vocabulary - size
        scores = mx.pad(scores, [(0, 0), (0, 0), (0, missing)], constant_values=mx.array(-mx.inf))
        processed = []
        for row in range(rows):
            logits = scores[:, row]
            for processor in self._processors:
                logits = processor(recent[0, : before + row], logits)
            processed.append(logits[..., :size])
        return mx.stack(processed, axis=1).astype(mx.float32)


def normalised(scores: mx.array) -> mx.array:
    """Log-probabilities, [..., V], of scores [..., V]."""
    return scores - mx.logsumexp(scores, axis=-1, keepdims=True)


def uniform_if_broken(scores: mx.array) -> mx.array:
    """The scores [..., V]; a row without a finite maximum, so no distribution, becomes 0."""
    finite = mx.isfinite(mx.max(scores, axis=-1, keepdims=True))
    return mx.where(finite, scores, 0)


def _counts(recent: mx.array, window: int, shape: tuple[int, ...]) -> mx.array:
    """How often each token occurs in the last `window` tokens before each row: float32 [B, N, V].

    Args:
        recent: see `Sampler.scores`.
    """
    batch, rows, vocabulary = shape
    before = recent.shape[1] - rows + 1
    if before < window:  # the whole text is shorter; later rows look back on more of it
        missing = window - before
        recent = mx.pad(recent, [(0, 0), (missing, 0)], constant_values=mx.array(NO_TOKEN))
        before = window
    places = mx.arange(rows)[:, None] + mx.arange(before - window, before)
    tokens = mx.take(recent, places, axis=1)  # [B, N, window]
    # An id outside this model's vocabulary is counted in an extra column, cut off below.
    tokens = mx.where((tokens < 0) | (tokens >= vocabulary), vocabulary, tokens)
    index = tokens + (mx.arange(batch * rows) * (vocabulary + 1)).reshape(batch, rows, 1)
    counts = mx.zeros((batch * rows * (vocabulary + 1),), mx.float32).at[index.flatten()].add(1.0)
    return counts.reshape(batch, rows, vocabulary + 1)[..., :vocabulary]


def _keep_top_p(x: mx.array, top_p: mx.array) -> mx.array:
    # A token is dropped where the likelier ones alone reach top_p; the likeliest always stays.
    ascending = mx.sort(x, axis=-1)
    above = mx.cumsum(mx.exp(ascending), axis=-1, reverse=True, inclusive=False)
    dropped = mx.sum(above >= top_p, axis=-1, keepdims=True)
    dropped = mx.minimum(dropped, x.shape[-1] - 1)
    return _keep(x, x >= mx.take_along_axis(ascending, dropped, axis=-1))


def _keep(x: mx.array, kept: mx.array) -> mx.array:
    return mx.where(kept, x, -mx.inf)
