"""The rules that send a question to an upstream. Each judges the beginning of a local answer.

A rule is a pure function: it sees a draft and the thresholds, and returns why the question should
go to the upstream, or None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

from mlxspec.metrics import Logprob

MARKERS = ("...", "…", "I think", "maybe")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """When a question goes to the upstream, and whose answer is then used.

    A rule whose threshold is None, or whose list is empty, is off.

    Args:
        max_draft_tokens: tokens of the local answer that the rules judge.
        min_confidence: the similarity of both answers from which the local one is used, 0 to 1.
        near_limit: the share of the answer's limit of tokens that a draft may not reach.
        min_chars: characters that an answer has which ended within the draft.
        markers: words of uncertainty, found as whole words in any case.
        min_logprob: of the draft's tokens, the mean log-probability.
        max_entropy: of the target's choices, the mean entropy in nats.
    """

    max_draft_tokens: int = 10
    min_confidence: float = 0.8
    near_limit: float | None = 0.9
    min_chars: int | None = 50
    markers: tuple[str, ...] = MARKERS
    min_logprob: float | None = -1.5
    max_entropy: float | None = 2.0


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The beginning of a local answer, at most `max_draft_tokens` long.

    Args:
        tokens: how many it has. limit: how many the whole answer may have.
        ended: whether the answer ended by itself within it.
        logprobs: of its tokens, as the target sees them. entropies: of its choices, in nats.
    """

    text: str
    tokens: int
    limit: int
    ended: bool
    logprobs: Sequence[float] = ()
    entropies: Sequence[float] = ()

    @property
    def logprob(self) -> float | None:
        """The mean log-probability of the tokens; None where none are known."""
        return fmean(self.logprobs) if self.logprobs else None

    @property
    def entropy(self) -> float | None:
        """The mean entropy of the target's choices in nats; None where none is known."""
        return fmean(self.entropies) if self.entropies else None


@dataclass(frozen=True)
class Finding:
    """The rule that sends a question to the upstream, by its name, and why in words."""

    rule: str
    why: str


def entropy(one: Logprob) -> float:
    """At least so much entropy has one choice, in nats.

    No token beside the likeliest ones is likelier than the last of these, which is what all others
    together have to be spread over.
    """
    told = [(math.exp(value), value) for _, value in one.top]
    rest = max(0.0, 1.0 - math.fsum(share for share, _ in told))
    return -math.fsum([*(share * value for share, value in told), rest * told[-1][1]])


def near_limit(draft: Draft, most: Thresholds) -> str | None:
    """The draft needs nearly all tokens that the answer may have: it would be cut."""
    if most.near_limit is None or draft.tokens < most.near_limit * draft.limit:
        return None
    return f"the draft has {draft.tokens} of the answer's {draft.limit} tokens"


def short(draft: Draft, most: Thresholds) -> str | None:
    """The answer ended after a few characters. A draft that was cut says nothing of its length."""
    count = len(draft.text.strip())
    if most.min_chars is None or not draft.ended or count >= most.min_chars:
        return None
    return f"the answer ended after {count} characters"


def uncertain(draft: Draft, most: Thresholds) -> str | None:
    """The draft holds a marker of uncertainty."""
    found = next((one for one in most.markers if _holds(draft.text, one)), None)
    return None if found is None else f"the draft says “{found}”"


def unlikely(draft: Draft, most: Thresholds) -> str | None:
    """The target found its own tokens unlikely."""
    mean = draft.logprob
    if most.min_logprob is None or mean is None or mean >= most.min_logprob:
        return None
    return f"the mean log-probability of the draft is {mean:.2f}"


def undecided(draft: Draft, most: Thresholds) -> str | None:
    """The target had many choices that were nearly as likely."""
    mean = draft.entropy
    if most.max_entropy is None or mean is None or mean <= most.max_entropy:
        return None
    return f"the mean entropy of the draft is {mean:.2f} nats"


RULES: Mapping[str, Callable[[Draft, Thresholds], str | None]] = MappingProxyType(
    {
        "near_limit": near_limit,
        "short": short,
        "uncertain": uncertain,
        "unlikely": unlikely,
        "undecided": undecided,
    }
)


def judged(draft: Draft, most: Thresholds, off: frozenset[str] = frozenset()) -> list[Finding]:
    """What the rules find, but for those that are off, by their names."""
    found = [(name, rule(draft, most)) for name, rule in RULES.items() if name not in off]
    return [Finding(name, why) for name, why in found if why is not None]


def _holds(text: str, marker: str) -> bool:
    """Whether a text holds a marker, which is no part of a longer word."""
    marker = marker.casefold()
    before = r"(?<![^\W_])" if marker[:1].isalnum() else ""
    behind = r"(?![^\W_])" if marker[-1:].isalnum() else ""
    return re.search(before + re.escape(marker) + behind, text.casefold()) is not None
