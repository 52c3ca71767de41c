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
_WHOLE = 2**30  # tokens to look back on: the whole text
# Dividing by less would overflow float32; the distribution is a point mass long before.
_COLDEST = 1e-30


class Knobs(NamedTuple):
    """The parameters that are data: arrays [B], so that a new value needs no new graph.

    All are float32 but those that count tokens. The method tells `top_k` and `windows` where all
    rows have the same.

    temperature: 0 of a greedy row.
    top_k: int32, 0 where all tokens stay. windows: int32 [B, 3]: how many tokens the repetition,
        presence and frequency penalties look back on.
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
    top_k: mx.array
    windows: mx.array
    bias: mx.array


def knobs_of(params: SamplingParams, batch: int, vocabulary: int) -> Knobs:
    """The knobs of `batch` sequences with the same sampling parameters.

    A value that turns a step off makes it the identity, because another row may use the step.

    Args:
        vocabulary: V; biases of ids past it have no effect.
    """
    threshold = params.acceptance_threshold
    values = (
        params.temperature and max(params.temperature, _COLDEST),
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
    penalties = params.penalties
    contexts = (
        penalties.repetition_context,
        penalties.presence_context,
        penalties.frequency_context,
    )
    windows = mx.array([[context or _WHOLE for context in contexts]] * batch, mx.int32)
    known = {token: value for token, value in params.logit_bias.items() if token < vocabulary}
    bias = mx.zeros((batch, vocabulary if params.logit_bias else 0), mx.float32)
    if known:
        bias[:, mx.array(list(known))] = mx.array(list(known.values()), mx.float32)
    columns = [mx.full((batch,), value, mx.float32) for value in values]
    return Knobs._make([*columns, mx.full((batch,), params.top_k, mx.int32), windows, bias])


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
    def looks_back(self) -> bool:
        """Whether scores depend on the tokens before."""
        return self.sees_whole_text or self.context > 0

    @property
    def context(self) -> int:
        """The number of `recent` tokens needed, where the whole text is not."""
        return self.method.windows.longest

    def recent_of(self, recent: mx.array) -> mx.array:
        """As many last tokens of texts as are needed: int32 [B, W], from any number of them."""
        if self.sees_whole_text:
            return recent
        missing = self.context - recent.shape[1]
        if missing <= 0:
            return recent[:, -missing:]
        return mx.pad(recent, [(0, 0), (missing, 0)], constant_values=mx.array(NO_TOKEN))

    def knobs_for(self, knobs: Knobs) -> Knobs:
        """`knobs` with a bias of each token where there are biases, and of none elsewhere."""
        count = self.vocabulary if self.method.bias else 0
        if knobs.bias.shape[1] == count:
            return knobs
        return knobs._replace(bias=mx.zeros((knobs.bias.shape[0], count), mx.float32))

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

        def times(penalty: int, window: int) -> mx.array:
            of_row = knobs.windows[:, penalty] if self.method.by_row else None
            return _counts(recent, window, scores.shape, of_row)

        windows = self.method.windows
        if windows.repetition:
            penalty = knobs.repetition[:, None, None]
            scaled = mx.where(scores < 0, scores * penalty, scores / penalty)
            scores = mx.where(times(0, windows.repetition) > 0, scaled, scores)
        if windows.presence:
            seen = times(1, windows.presence) > 0
            scores = scores - knobs.presence[:, None, None] * seen
        if windows.frequency:
            count = times(2, windows.frequency)
            scores = scores - knobs.frequency[:, None, None] * count
        return scores

    def log_probs(self, scores: mx.array, knobs: Knobs) -> mx.array:
        """Log-probabilities, float32 [B, N, V'], of the distribution that is sampled.

        Args:
            scores: as `scores` returns them; not for a greedy method. Of a greedy row the result
                means nothing.
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

    def unless_greedy(self, sampled: mx.array, greedy: mx.array, knobs: Knobs) -> mx.array:
        """`sampled`, [B, …], and in a greedy row beside sampled ones `greedy`."""
        if not self.method.by_row:
            return sampled
        is_greedy = knobs.temperature.reshape(-1, *[1] * (sampled.ndim - 1)) == 0
        return mx.where(is_greedy, greedy, sampled)

    def _tempered(self, x: mx.array, knobs: Knobs) -> mx.array:
        if 0 < self.method.top_k < x.shape[-1] or (self.method.top_k and self.method.by_row):
            x = _keep(x, self._is_in_top_k(x, knobs))
        return normalised(x / mx.maximum(knobs.temperature, _COLDEST)[:, None, None])

    def _is_in_top_k(self, x: mx.array, knobs: Knobs) -> mx.array:
        """Boolean [B, N, V']: the tokens that are no less likely than the last of the top k."""
        most = min(self.method.top_k, x.shape[-1])
        top = mx.topk(x, most, axis=-1)
        if not self.method.by_row:
            return x >= mx.min(top, axis=-1, keepdims=True)
        count = knobs.top_k[:, None, None]
        last = mx.broadcast_to(mx.maximum(most - count, 0), (*x.shape[:-1], 1))
        least = mx.take_along_axis(mx.sort(top, axis=-1), last, axis=-1)
        return (x >= least) | (count == 0)

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


def _counts(
    recent: mx.array, window: int, shape: tuple[int, ...], of_row: mx.array | None
) -> mx.array:
    """How often each token occurs in the last `window` tokens before each row: float32 [B, N, V].

    Args:
        recent: see `Sampler.scores`.
        of_row: int32 [B], the tokens to look back on in each sequence; None is `window` in all.
    """
    batch, rows, vocabulary = shape
    before = recent.shape[1] - rows + 1
    if before < window:  # the whole text is shorter; later rows look back on more of it
        missing = window - before
        recent = mx.pad(recent, [(0, 0), (missing, 0)], constant_values=mx.array(NO_TOKEN))
        before = window
    places = mx.arange(rows)[:, None] + mx.arange(before - window, before)
    tokens = mx.take(recent, places, axis=1)  # [B, N, window]
    if of_row is not None:
        is_near = mx.arange(window, 0, -1) <= of_row[:, None, None]
        tokens = mx.where(is_near, tokens, NO_TOKEN)
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
