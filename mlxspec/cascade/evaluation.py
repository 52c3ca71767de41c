"""What rules and thresholds would have done with prompts whose answers are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from mlxspec.cascade.answers import Local
from mlxspec.cascade.gathering import Case
from mlxspec.cascade.rules import RULES, Thresholds, judged
from mlxspec.cascade.upstreams import Upstream

# The rule that a threshold belongs to, and the values that are tried beside the one that is set.
_TRIED: dict[str, tuple[str, tuple[float, ...]]] = {
    "near_limit": ("near_limit", (0.5, 0.7, 0.9)),
    "min_chars": ("short", (20, 50, 100, 200)),
    "min_logprob": ("unlikely", (-2.0, -1.5, -1.0, -0.5, -0.25)),
    "max_entropy": ("undecided", (3.0, 2.0, 1.5, 1.0, 0.5)),
}
_LENGTHS = (5, 10, 20, 40, 80, 160)
_CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ABOVE_ALL = 2.0  # no two answers are so alike
ALL, LOCAL, FAR = "all rules", "local alone", "upstream alone"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Thresholds that are tried.

    Args:
        name: of the threshold whose `value` is tried; or ALL for those that are set.
        off: the names of rules that are not asked. A rule's threshold is tried without the others.
        is_set: whether this value holds.
    """

    name: str
    value: float | str | None = None
    thresholds: Thresholds
    off: frozenset[str]
    is_set: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a setting would have done. Shares are 0 to 1; None stands for what is not known.

    Args:
        asked: the share of prompts that would have gone to the upstream.
        similarity: the mean similarity of both answers to those.
        used: the share of prompts whose answer would be the upstream's.
        missed: the share that would have stayed local although the answers differ.
        cost: of all answers of the upstream, in the currency of its prices.
        latency_s: mean seconds to the whole answer.
    """

    name: str
    value: float | str | None
    is_set: bool
    asked: float
    similarity: float | None
    used: float | None
    missed: float | None
    cost: float | None
    latency_s: float | None

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for name in ("asked", "similarity", "used", "missed", "latency_s"):
            found[name] = None if found[name] is None else round(found[name], 4)
        return found


def settings(most: Thresholds, off: frozenset[str]) -> Iterator[Setting]:
    """All that is tried: what is set, then each length, each similarity, and each rule alone."""
    yield Setting(name=ALL, thresholds=most, off=off)
    for name, tried in (("max_draft_tokens", _LENGTHS), ("min_confidence", _CONFIDENCES)):
        value = getattr(most, name)
        for one in sorted({*tried, value}):
            changed = replace(most, **{name: one})
            yield Setting(name=name, value=one, thresholds=changed, off=off, is_set=one == value)
    for name, (rule, values) in _TRIED.items():
        value = getattr(most, name)
        alone = frozenset(RULES) - {rule}
        for one in sorted({*values, *([] if value is None else [value])}):
            is_set = one == value and rule not in off
            changed = replace(most, **{name: one})
            yield Setting(name=name, value=one, thresholds=changed, off=alone, is_set=is_set)
    for marker in most.markers:
        changed, alone = replace(most, markers=(marker,)), frozenset(RULES) - {"uncertain"}
        is_set = "uncertain" not in off
        yield Setting(name="markers", value=marker, thresholds=changed, off=alone, is_set=is_set)


def outcomes(
    cases: Sequence[Case], most: Thresholds, off: frozenset[str], upstream: Upstream | None
) -> list[Outcome]:
    """What each setting would have done with the prompts that have a local answer.

    Args:
        upstream: None leaves out what needs one.
    """
    cases = [case for case in cases if case.local is not None]
    if not cases:
        return []
    found = []
    for setting in settings(most, off):
        if upstream is not None or setting.name != "min_confidence":
            asks = [bool(rules_of(case.local, setting)) for case in cases if case.local]
            found.append(_outcome(setting, cases, asks, upstream))
    local = Setting(name=LOCAL, thresholds=most, off=off)
    beside = [_outcome(local, cases, [False] * len(cases), upstream)]
    if upstream is not None:
        far = replace(local, name=FAR, thresholds=replace(most, min_confidence=ABOVE_ALL))
        beside.append(_outcome(far, cases, [True] * len(cases), upstream, waits=False))
    return [*found[:1], *beside, *found[1:]]


def rules_of(local: Local, setting: Setting) -> tuple[str, ...]:
    """The rules that ask for the upstream."""
    draft = local.draft(setting.thresholds.max_draft_tokens)
    return tuple(one.rule for one in judged(draft, setting.thresholds, setting.off))


def cost_of(case: Case, upstream: Upstream) -> float | None:
    """What the upstream's answer cost; None where that is not known."""
    reply = case.reply
    return None if reply is None else upstream.cost(reply.tokens_in, reply.tokens_out)


def _outcome(
    setting: Setting,
    cases: Sequence[Case],
    asks: Sequence[bool],
    upstream: Upstream | None = None,
    *,
    waits: bool = True,
) -> Outcome:
    """What becomes of prompts of which some go to the upstream.

    Args:
        waits: whether the local answer is written first.
    """
    most = setting.thresholds
    asked = [case for case, sent in zip(cases, asks, strict=True) if sent]
    likeness = [case.similarity for case in asked if case.similarity is not None]
    known = [(case.similarity, sent) for case, sent in zip(cases, asks, strict=True)]
    differ = [sent for like, sent in known if like is not None and like < most.min_confidence]
    both = sum(like is not None for like, _ in known)
    costs = [None if upstream is None else cost_of(case, upstream) for case in asked]
    seconds = [
        _latency_s(case, most, sent=sent, waits=waits)
        for case, sent in zip(cases, asks, strict=True)
    ]
    return Outcome(
        name=setting.name,
        value=setting.value,
        is_set=setting.is_set,
        asked=len(asked) / len(cases),
        similarity=fmean(likeness) if likeness else None,
        used=sum(differ) / both if both else None,
        missed=(len(differ) - sum(differ)) / both if both else None,
        cost=_sum(costs) if upstream is not None else None,
        latency_s=None if None in seconds else fmean(filter(None, seconds)),
    )


def _latency_s(case: Case, most: Thresholds, *, sent: bool, waits: bool) -> float | None:
    """Seconds to the whole answer: both are written at a time, once a draft is judged."""
    assert case.local is not None, "there is a local answer"
    if not sent:
        return case.local.whole_s
    if case.reply is None:
        return None
    if not waits:
        return case.reply.seconds
    return max(case.local.whole_s, case.local.draft_s(most.max_draft_tokens) + case.reply.seconds)


def _sum(costs: Sequence[float | None]) -> float | None:
    """The sum of those that are known; None where there are some, and none is."""
    told = [cost for cost in costs if cost is not None]
    return sum(told) if told or not costs else None
