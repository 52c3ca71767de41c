"""Estimates of a round's tokens and time, from the rounds so far. Plain numbers, no clock.

`AcceptanceEstimate` gives N(K) = 1 + Σₖ Πⱼ≤ₖ aⱼ, the tokens that a round of K proposals commits on
average where position j is accepted with probability aⱼ once it is reached. `Costs` gives C(K),
the time of such a round relative to a round without proposals.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import exp, log, sqrt

# --- acceptance; weights are in rounds ---
# An unknown draft is expected to do well enough to be worth a try.
FIRST_RATE, FIRST_WEIGHT = 0.65, 2.0
# The weight of the previous position's rate.
NEIGHBOUR_WEIGHT = 4.0
# Texts differ: a handful of rounds of this text outvotes the stored rates.
STORED_WEIGHT = 3.0
# The prior rates of proposals from the text weigh little, too.
PRIOR_WEIGHT = 2.0
# Counts fade with every round of the drafter, so that about 20 rounds are remembered.
FADE = 0.95

# --- costs, as variances of natural logarithms: 0.1 is about 10% ---
NOISE = 0.1**2  # of one measurement
FIRST_PACE = 0.3**2  # of the pace after one measurement: a first round may be a slow one
PACE_DRIFT = 0.04**2  # of the machine, from one round to the next
UNKNOWN, UNKNOWN_TEXT = 0.3**2, 0.6**2  # of a ratio that was never measured
STORED = 0.05**2  # of a ratio that was measured in an earlier run
RATIO_DRIFT = 0.015**2  # of every ratio, from one round to the next
# Attention takes more of a round as a text grows, so ratios may move with every bucket of tokens.
BUCKET, BUCKET_DRIFT = 512, 0.03**2
# No round with proposals is much cheaper than one without: where it seems so, the host was late.
CHEAPEST = 0.9
# The assumed cost of one more proposal before any is measured, in plain rounds: from a model, and
# from the text, where optimism costs one round and the first measurement corrects it.
FIRST_STEP, FIRST_TEXT_STEP = 0.3, 0.2
# Where one pass drafts all K tokens and a single K was measured: the share of its cost beyond a
# plain round that is taken to be the same for every K. The rest is the target's.
SAME = 0.5
# The name for the costs of proposals from the text: a pass of the target, whichever drafter it is.
TEXT = "text"
# Numbers of tokens that are proposed from the text: each is a graph to trace, and rows in powers of
# two come near enough to the best number.
SIZES = (1, 3, 7, 15, 31)


@dataclass(frozen=True)
class Knowledge:
    """The costs and acceptance rates of a drafter that are known before a run, and after it.

    costs: of a round with 0, 1, 2, … proposals, in seconds or any other unit; None where it was not
        measured, empty if none was.
    acceptance: how often the first, second, … position was accepted when it was reached.
    """

    costs: tuple[float | None, ...] = ()
    acceptance: tuple[float, ...] = ()


LENGTH_CLASSES = (2_048, 8_192, 32_768)  # of texts; each class has its own knowledge


@dataclass
class Learned:
    """Knowledge by the length of texts: `by_length[i]` is for up to `LENGTH_CLASSES[i]` tokens.

    beside: the same of rounds of several rows, by their number.
    """

    by_length: dict[int, dict[str, Knowledge]] = field(default_factory=dict)
    beside: dict[int, Learned] = field(default_factory=dict)

    def at(self, length: int, rows: int = 1) -> dict[str, Knowledge]:
        """The knowledge for texts of `length` tokens, or for the nearest length that has any.

        What rounds of so many rows cost must be seen; how often a proposal is right is known from
        rounds of one row too.
        """
        if rows > 1:
            alone = {name: replace(one, costs=()) for name, one in self.at(length).items()}
            return alone | self.beside.get(rows, Learned()).at(length)
        there = length_class(length)
        nearest = min(self.by_length, key=lambda one: abs(one - there), default=there)
        return self.by_length.get(nearest, {})

    def by_rows(self, length: int) -> dict[int, dict[str, Knowledge]]:
        """The knowledge of every number of rows, by that number."""
        return {1: self.at(length)} | {rows: one.at(length) for rows, one in self.beside.items()}

    def learn(self, length: int, known: dict[str, Knowledge], rows: int = 1) -> None:
        if rows > 1:
            self.beside.setdefault(rows, Learned()).learn(length, known)
        elif known:
            there = length_class(length)
            self.by_length = self.by_length | {there: self.by_length.get(there, {}) | known}


def length_class(length: int) -> int:
    """The place in `LENGTH_CLASSES` of texts of so many tokens."""
    return bisect_left(LENGTH_CLASSES, length)


class AcceptanceEstimate:
    """Faded counts, for each position, of the rounds that reached it and of those that accepted it.

    Args:
        most: the largest K.
        known: rates by position from an earlier run. weight: of `known`, in rounds.
    """

    def __init__(
        self, most: int, known: Sequence[float] = (), weight: float = STORED_WEIGHT
    ) -> None:
        rates, weight = (known[:most], weight) if known else ([FIRST_RATE], FIRST_WEIGHT)
        missing = [0.0] * (most - len(rates))
        self._reached = [weight] * len(rates) + missing
        self._hits = [weight * rate for rate in rates] + missing
        self.tried = bool(known)

    def add(self, drafted: int, accepted: int, beside: int = 1) -> None:
        """Record a round of one text, beside so many in all."""
        self.tried = True
        fade = FADE ** (1 / beside)
        self._reached = [fade * count for count in self._reached]
        self._hits = [fade * count for count in self._hits]
        for k in range(min(drafted, accepted + 1)):
            self._reached[k] += 1
            self._hits[k] += k < accepted

    def soften(self, weight: float) -> None:
        """Limit the weight of every position to `weight` rounds: the text may have changed."""
        for k, reached in enumerate(self._reached):
            if reached > weight:
                self._hits[k] *= weight / reached
                self._reached[k] = weight

    def rates(self) -> list[float]:
        """aⱼ for j = 1, 2, …"""
        return acceptance_rates(self._hits, self._reached)

    def measured(self) -> list[float]:
        """aⱼ of the positions that some round has reached, in this run or before."""
        return [rate for rate, count in zip(self.rates(), self._reached, strict=True) if count]

    def tokens(self) -> list[float]:
        """N(K) for K = 0, 1, 2, …"""
        return expected_tokens(self.rates())


def acceptance_rates(hits: Sequence[float], reached: Sequence[float]) -> list[float]:
    """aⱼ from how many rounds reached each position and how many of them accepted it.

    A position is expected to do as the one before it, until rounds that reach it say otherwise.
    """
    rates: list[float] = []
    rate = hits[0] / reached[0] if reached[0] else 0.0
    for accepted, seen in zip(hits, reached, strict=True):
        rate = (accepted + NEIGHBOUR_WEIGHT * rate) / (seen + NEIGHBOUR_WEIGHT)
        rates.append(rate)
    return rates


def expected_tokens(rates: Sequence[float]) -> list[float]:
    """N(K) for K = 0 … len(rates)."""
    totals, run = [1.0], 1.0
    for rate in rates:
        run *= rate
        totals.append(totals[-1] + run)
    return totals


Expected = Callable[[str, int], "list[float] | None"]


class Costs:
    """A pace, and for every (drafter, K) a ratio to it: a Kalman filter over logarithms.

    A measurement is their sum plus noise. Where all rounds slow down alike, because the machine
    gets warm or the text longer, the pace drifts; where one kind does, its ratio drifts. The
    filter keeps their covariance: after many rounds of one kind only the sum is known well, and a
    plain round that reveals the pace then corrects the ratio too.

    Args:
        known: costs from an earlier run. expected: the curve of a drafter up to a K, as far as
            other rounds tell it.
        at_once: the drafters of which one pass drafts all tokens, whatever K is.

    Kalman, "A New Approach to Linear Filtering and Prediction Problems", 1960.
    """

    def __init__(
        self,
        known: Mapping[str, Knowledge],
        expected: Expected | None = None,
        *,
        at_once: Collection[str] = (),
    ) -> None:
        self.expected = expected or (lambda drafter, most: None)
        self._at_once = at_once
        self._bucket = 0
        self._slow = 0  # rounds in a row that were slower than expected
        self._fast = 0
        self._paced = False
        self._means = [0.0]  # the pace, then ratios in the order in which they were met
        self._covariance = [[FIRST_PACE]]
        self._places: dict[tuple[str, int], int] = {}
        for name, knowledge in known.items():
            plain, *others = knowledge.costs or (None,)
            for k, cost in enumerate(others, 1):
                if plain and cost and (name != TEXT or k in SIZES):
                    ratio = max(cost / plain, CHEAPEST)
                    self._meet(name, k, log(ratio), STORED)

    @property
    def unknown(self) -> bool:
        """Whether no round with proposals of a model has a cost yet."""
        return all(name == TEXT for name, _ in self._places)

    @property
    def plain_s(self) -> float | None:
        """Seconds of a round without proposals, at the present pace."""
        return exp(self._means[0]) if self._paced else None

    def enter(self, length: int) -> None:
        """Note that the text has `length` tokens now."""
        if length // BUCKET > self._bucket:
            self._bucket = length // BUCKET
            self._drift(BUCKET_DRIFT)

    def add(self, drafter: str, count: int, seconds: float) -> None:
        """Record that a round with `count` proposals took `seconds`."""
        if count and not self.knows(drafter, count):
            unknown = UNKNOWN_TEXT if drafter == TEXT else UNKNOWN
            self._meet(drafter, count, log(self.curve(drafter, count)[count]), unknown)
        parts = [0, self._places[drafter, count]] if count else [0]
        if not self._paced:
            self._means[0] = log(seconds) - sum(self._means[i] for i in parts[1:])
            self._paced = True
            return
        self._covariance[0][0] += PACE_DRIFT
        self._drift(RATIO_DRIFT)
        surprise = log(seconds) - sum(self._means[i] for i in parts)
        self._correct(parts, surprise, self._noise(surprise))

    def knows(self, drafter: str, count: int) -> bool:
        return (drafter, count) in self._places

    def doubt(self, drafter: str, count: int) -> float:
        """The standard deviation of the logarithm of a known cost."""
        place = self._places[drafter, count]
        return sqrt(self._covariance[place][place])

    def measured(self, drafter: str) -> int:
        """The largest K whose cost is known."""
        return max((k for name, k in self._places if name == drafter), default=0)

    def curve(self, drafter: str, most: int) -> list[float]:
        """C(K)/C(0) for K = 0 … `most`: as is expected, scaled by known costs near it.

        Where nothing is expected, it is linear between known costs and beyond them.
        """
        known = {k: self._means[i] for (name, k), i in self._places.items() if name == drafter}
        points = [(k, exp(value)) for k, value in sorted({0: 0.0, **known}.items())]
        expected = self.expected(drafter, max(most, points[-1][0]))
        if expected is not None:
            return _scaled(points, expected)[: most + 1]
        if drafter in self._at_once:
            return _at_once(points[1:], most)
        last, cost = points[-1]
        first_step = FIRST_TEXT_STEP if drafter == TEXT else FIRST_STEP
        return _on_lines(points, (cost - 1) / last if last else first_step, most)

    def _meet(self, drafter: str, count: int, value: float, variance: float) -> None:
        self._places[drafter, count] = len(self._means)
        self._means.append(value)
        for row in self._covariance:
            row.append(0.0)
        self._covariance.append([0.0] * len(self._places) + [variance])

    def _drift(self, variance: float) -> None:
        """Raise the variance of every ratio, because each may have moved by itself."""
        for place in self._places.values():
            here = self._covariance[place]
            here[place] = max(here[place], min(here[place] + variance, UNKNOWN))

    def _noise(self, surprise: float) -> float:
        """The variance of a measurement that differs from its expectation by `surprise`.

        Another program may slow a round down, so one that is much too slow counts little until
        that lasts. One that is much too fast may have been read too late, and counts little too.
        """
        if surprise <= 0:
            self._slow, self._fast = 0, self._fast + 1
            return max(NOISE, (surprise / (4 * self._fast)) ** 2)
        self._slow, self._fast = self._slow + 1, 0
        return max(NOISE, (surprise / (2 * self._slow)) ** 2)

    def _correct(self, parts: list[int], surprise: float, noise: float) -> None:
        """Move the parts of a measured sum, and all that covaries with them, towards it."""
        together = [sum(row[i] for i in parts) for row in self._covariance]
        total = sum(together[i] for i in parts) + noise
        for i, share in enumerate(together):
            self._means[i] += surprise * share / total
            row = self._covariance[i]
            for j, other in enumerate(together):
                row[j] -= share * other / total
        for place in self._places.values():
            self._means[place] = max(self._means[place], log(CHEAPEST))


def _on_lines(points: Sequence[tuple[int, float]], step: float, most: int) -> list[float]:
    """A curve from K = 0 through the points, and from the last on in steps, which never fall."""
    curve: list[float] = []
    for (a, cost), (b, after) in pairwise(points):
        curve += [cost + (after - cost) * (k - a) / (b - a) for k in range(a, b)]
    last, cost = points[-1]
    return (curve + [cost + max(step, 0.0) * (k - last) for k in range(last, most + 1)])[: most + 1]


def _at_once(known: Sequence[tuple[int, float]], most: int) -> list[float]:
    """A curve through what is known of K ≥ 1, where one pass drafts all K tokens.

    From K to K + 1 only the target's pass grows, so a round's cost lies on a line that begins
    above a plain round's.
    """
    known = known or [(1, 1 + FIRST_STEP)]
    points = [(0, 1 + SAME * (known[0][1] - 1)), *known]
    (a, cost), (b, after) = points[1] if len(known) > 1 else points[0], points[-1]
    return [1.0, *_on_lines(points, (after - cost) / (b - a), most)[1:]]


def _scaled(points: Sequence[tuple[int, float]], expected: Sequence[float]) -> list[float]:
    """A curve through the points; between them, and beyond, as is expected, and never falling."""
    known = dict(points)
    scales = [(k, cost / expected[k]) for k, cost in points if k < len(expected)]
    curve: list[float] = []
    for k, cost in enumerate(expected):
        (a, low) = max(one for one in scales if one[0] <= k)
        (b, high) = min((one for one in scales if one[0] >= k), default=(a, low))
        scale = low + (high - low) * (k - a) / (b - a) if b > a else low
        curve.append(known.get(k) or max(cost * scale, curve[-1]))
    return curve
