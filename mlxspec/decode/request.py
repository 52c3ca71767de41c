"""The request for one text, with every choice made before its first token is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxspec.calling import Calling
from mlxspec.device import lengths
from mlxspec.params import Method, SamplingParams
from mlxspec.reasoning import Reasoning
from mlxspec.sampling.sampler import Processor

GREEDY = SamplingParams()
UNLIMITED = 2**31 - 1

Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The request for one text. `Engine.request` makes one; everything after that takes it.

    Args:
        tokens: ids of the prompt, at least one.
        limit: the most tokens in all, the prompt's included.
        draft_tokens: K, or the largest where it is chosen round by round; 0 decodes plainly.
        auto: whether the drafter and K are chosen round by round.
        sampling: with a seed, and with the tokens that XTC spares.
        stop: the text ends before the first of these strings.
        ends: token ids that end the text and are no part of it.
        continues: whether the text goes on where the prompt ends, so that a leading space counts.
        prediction: ids of a text that is expected, at least in parts.
        processors: a caller's own logits processors.
        capacity: entries that the caches have room for from the start.
        cache: a file that the prompt's past is kept in.
        notes: what a person should know of how the prompt was made.
        reasoning: how the model's reasoning is told from its answer, where it marks it; None, which
            `raw` asks for, leaves the text as it is.
        logprobs: the likeliest tokens to tell with the log-probability of each; None tells none.
        calling: how the model calls the tools that it was offered; None leaves calls in the text.
    """

    tokens: tuple[int, ...]
    limit: int = UNLIMITED
    draft_tokens: int = 0
    auto: bool = False
    sampling: SamplingParams = GREEDY
    stop: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    continues: bool = False
    prediction: tuple[int, ...] = ()
    processors: tuple[Processor, ...] = ()
    capacity: int = 0
    cache: Path | None = None
    notes: tuple[str, ...] = ()
    reasoning: Reasoning | None = None
    logprobs: int | None = None
    calling: Calling | None = None

    @property
    def method(self) -> Method:
        """The part of the sampling parameters that shapes a round's graph."""
        whole = lengths.reserved(self.limit) if self.limit < UNLIMITED else None
        return self.sampling.method(whole)
