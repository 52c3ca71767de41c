"""What repeated measurements tell: medians with intervals, a machine's drift, and what changed.

Values are times or speeds: positive, and scattered in proportion to their size. So intervals are
made of logarithms. An interval holds the median of the population with the confidence asked for,
whatever the population's shape, and it is exact for as few as two values:

- With enough values (six at 95%) it lies between two order statistics, whose coverage is binomial,
  interpolated to the confidence (Hettmansperger and Sheather, Statistics & Probability Letters 4,
  1986). It is what bootstraps of a median approach, without their draws: the percentile
  bootstrap's 95% hold the median of 3 values in 75 of 100 samples, and that of 30 in 94.
- With fewer values it reaches beyond the least and the greatest by a multiple of their distance.
  A parametric bootstrap of that pivot (Efron and Tibshirani, An Introduction to the Bootstrap,
  1993, 6.5) finds the multiple: it is right for log-normal values and within 2 points of 95% for
  exponential ones.

Values must be independent. Repetitions of one prompt are not; take the median of each prompt first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import combinations
from math import comb, inf, log
from statistics import median

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
# The least change that is called one. Two runs of the same work differ by as much as a machine's
# clock, its memory's layout and its temperature do, which no sample within a run shows.
NOTHING = 0.02
# A machine whose noise (one standard deviation) or trend over the run is larger tells too little.
TOO_NOISY = 0.15
TOO_MUCH_DRIFT = 0.1
# How often the pivot of a small sample is drawn. The multiple's error is below 1%.
DRAWS = 200_000
# Fewer turns are not judged: two may agree by chance. With fewer pairs of the same work, a trend
# would explain all noise away.
FEWEST = 3
# The standard deviation of normal values over their median absolute deviation.
OF_MAD = 1.4826


@dataclass(frozen=True)
class Interval:
    """A median, and the limits between which the population's median lies.

    One value says nothing of the population: its limits are 0 and infinity.
    """

    median: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        return self.high < inf

    @property
    def precision(self) -> float:
        """Half the interval's width, as a fraction of the median; infinity for one value."""
        return (self.high - self.low) / 2 / abs(self.median) if self.median else inf


def interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The median of positive values, and its interval.

    Raises:
        ValueError: there are no values, or one of them is not a positive number.
    """
    array = np.asarray(values, float)
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError("an interval is made of positive numbers")
    centre = median(values)
    if len(array) == 1:
        return Interval(centre, 0.0, inf)
    (low,), (high,) = np.exp(limits(np.log(array / centre)[None], confidence))
    return Interval(centre, centre * float(low), centre * float(high))


def interval_of_ratio(
    over: Sequence[float], under: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval:
    """The median of `over[i] / under[i]`, and its interval. The two of a turn belong together.

    Raises:
        ValueError: the two differ in length or are empty, or hold what is not a positive number.
    """
    if len(over) != len(under):
        raise ValueError(f"{len(over)} values cannot be paired with {len(under)}")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.asarray(over, float) / np.asarray(under, float)
    return interval(ratios.tolist(), confidence=confidence)


def limits(
    samples: npt.NDArray[np.float64], confidence: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The limits of the median for each sample of N ≥ 2 values, [B, N] -> [B] and [B]."""
    ordered = np.sort(samples, axis=1)
    count = ordered.shape[1]
    depth, inner = _depth(count, confidence)
    if not depth:
        beyond = _multiple(count, confidence) * (ordered[:, -1] - ordered[:, 0])
        return ordered[:, 0] - beyond, ordered[:, -1] + beyond
    low = (1 - inner) * ordered[:, depth - 1] + inner * ordered[:, depth]
    high = (1 - inner) * ordered[:, count - depth] + inner * ordered[:, count - depth - 1]
    return low, high


def _depth(count: int, confidence: float) -> tuple[int, float]:
    """d, and the weight of the next value inwards: the interval begins at the d-th least value.

    d is 0 where not even the least and the greatest value are far enough apart.
    """
    # A value lies below the median as often as a coin shows heads, so the d-th least and the d-th
    # greatest value lie on either side with probability 1 - 2·P(fewer than d heads).
    depth, tail, outer = 0, 0.0, 1.0
    while 2 * (depth + 1) <= count:
        tail += comb(count, depth) / 2**count
        coverage = 1 - 2 * tail
        if coverage < confidence:
            break
        depth, outer = depth + 1, coverage
    else:
        return depth, 0.0
    if not depth:
        return 0, 0.0
    share = (outer - confidence) / (outer - coverage)
    return depth, (count - depth) * share / (depth + (count - 2 * depth) * share)


@cache
def _multiple(count: int, confidence: float) -> float:
    """How far the limits of few values lie beyond the extreme ones, in distances of those."""
    drawn = np.random.default_rng(0).standard_normal((DRAWS, count))
    low, high = drawn.min(axis=1), drawn.max(axis=1)
    return float(np.quantile(np.maximum(low, -high) / (high - low), confidence))


@dataclass(frozen=True)
class Drift:
    """How steady a machine was, from the same work done again and again.

    noise: the standard deviation of one value, as a fraction; NaN where too little was repeated.
    change: what the trend adds up to from the first value to the last: -0.1 is 10% less.
    is_trend: the change is beyond what noise alone would show (p < 0.05).
    """

    noise: float
    change: float
    is_trend: bool

    @property
    def is_known(self) -> bool:
        return not math.isnan(self.noise)

    @property
    def is_too_noisy(self) -> bool:
        """Whether figures of this run tell too little to choose by."""
        return self.noise > TOO_NOISY or (self.is_trend and abs(self.change) > TOO_MUCH_DRIFT)

    def __str__(self) -> str:
        if not self.is_known:
            return "unknown, as too little was repeated"
        noise = f"{self.noise:.1%} noise"
        trend = f"{self.change:+.1%} over the run" if self.is_trend else "no trend"
        return f"{noise}, {trend}" + (": too noisy to tell" if self.is_too_noisy else "")


def drift(
    at_s: Sequence[float], values: Sequence[float], work: Sequence[Hashable] | None = None
) -> Drift:
    """The drift of a machine, from speeds (or times) of interleaved samples of the baseline.

    The trend is the median slope of all pairs of the same work, and a seasonal Kendall test says
    whether it is one (Hirsch, Slack and Smith, Water Resources Research 18, 1982): neither minds an
    outlier, or that one prompt is slower than another. The noise is what pairs differ by beside it.

    Args:
        at_s: when each value was measured, in seconds.
        work: what was done, as prompts differ; None says that all did the same.
    """
    groups: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for at, value, what in zip(at_s, values, work or [0] * len(values), strict=True):
        groups[what].append((at, log(value)))
    steps = []
    score, variance = 0.0, 0.0
    for some in groups.values():
        count = len(some)
        variance += count * (count - 1) * (2 * count + 5) / 18
        for (at, one), (later, other) in combinations(sorted(some), 2):
            score += np.sign(other - one)
            steps.append((later - at, other - one))
    slopes = [step / passed for passed, step in steps if passed]
    if len(slopes) < FEWEST:
        return Drift(math.nan, 0.0, False)
    slope = median(slopes)
    # Two values differ by more than either is off, and by this much more as often as not.
    apart = median([abs(step - slope * passed) for passed, step in steps])
    total = math.expm1(slope * (max(at_s) - min(at_s)))
    certain = max(abs(score) - 1, 0) / math.sqrt(variance) > 1.96
    return Drift(apart * OF_MAD / math.sqrt(2), total, bool(certain))


class Verdict(StrEnum):
    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    UNCLEAR = "unclear"


@dataclass(frozen=True)
class Change:
    """What became of a speed: after over before, turn by turn, and what that means."""

    ratio: Interval
    verdict: Verdict

    def is_regression(self, threshold: float) -> bool:
        """Whether it is slower beyond noise, and by more than `threshold`, a fraction."""
        return self.verdict is Verdict.SLOWER and self.ratio.median < 1 - threshold


def change(
    before: Sequence[float],
    after: Sequence[float],
    *,
    comparisons: int = 1,
    unsteady: float = 0,
) -> Change:
    """How speeds changed. The two of a turn belong together: the same prompt, before and after.

    A change is called where the whole interval lies beyond what counts as nothing, and sameness
    where the whole interval lies within; all else is unclear, and so are fewer than 3 turns.

    Args:
        comparisons: how many are made together. Each gets its part of the 5% of false alarms
            (Bonferroni), so that 5% is the chance of any.
        unsteady: by how much the machine itself drifted in either run, as a fraction. What is not
            beyond that is not called.
    """
    ratio = interval_of_ratio(after, before, confidence=1 - (1 - CONFIDENCE) / comparisons)
    least = max(NOTHING, unsteady)
    if len(before) < FEWEST:
        verdict = Verdict.UNCLEAR
    elif ratio.low > 1 + least:
        verdict = Verdict.FASTER
    elif ratio.high < 1 - least:
        verdict = Verdict.SLOWER
    elif ratio.low >= 1 - NOTHING and ratio.high <= 1 + NOTHING:
        verdict = Verdict.SAME
    else:
        verdict = Verdict.UNCLEAR
    return Change(ratio, verdict)
