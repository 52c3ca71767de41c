"""Statistics of the benchmarks, against populations whose medians and changes are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlxspec.bench.statistics import (
    Verdict,
    change,
    drift,
    interval,
    interval_of_ratio,
    limits,
)

SAMPLES = 20_000
# Populations of times around a median, and that median. Rounds share a prompt's own speed.
POPULATIONS = {
    "normal": (lambda rng, shape: 1 + 0.05 * rng.standard_normal(shape), 1.0),
    "log-normal": (lambda rng, shape: np.exp(0.3 * rng.standard_normal(shape)), 1.0),
    "skewed": (lambda rng, shape: 1 + rng.exponential(0.2, shape), 1 + 0.2 * math.log(2)),
    "exponential": (lambda rng, shape: rng.exponential(1, shape), math.log(2)),
    "outliers": (lambda rng, shape: np.exp(0.05 * rng.standard_t(3, shape)), 1.0),
}


def of(name, count, seed=0):
    draw, middle = POPULATIONS[name]
    return draw(np.random.default_rng(seed), (SAMPLES, count)), middle


def coverage(samples, middle, confidence=0.95):
    low, high = limits(np.log(samples), confidence)
    return np.mean((low <= math.log(middle)) & (math.log(middle) <= high))


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 9, 12, 17, 30])
def test_a_95_percent_interval_holds_the_median_95_times_in_100(name, count):
    assert 0.93 <= coverage(*of(name, count)) <= 0.97


@pytest.mark.parametrize(("confidence", "count"), [(0.8, 3), (0.8, 20), (0.99, 6), (0.99, 30)])
def test_other_confidences_are_kept_too(confidence, count):
    covered = coverage(*of("log-normal", count), confidence)
    assert covered == pytest.approx(confidence, abs=0.02)


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize("count", [3, 6, 15])
def test_ratios_of_turns_are_covered_whatever_the_prompts(name, count):
    """Both halves of a turn share what its prompt costs, and have noise of their own."""
    over, _ = of(name, count, seed=1)
    under, _ = of(name, count, seed=2)
    prompts = np.exp(np.random.default_rng(3).standard_normal(over.shape))
    assert 0.93 <= coverage(1.7 * over * prompts / (under * prompts), 1.7) <= 0.97


def test_an_interval_is_that_of_its_logarithms():
    values = [3.0, 1.0, 2.0, 8.0, 5.0, 9.0, 4.0]
    found = interval(values)
    (low,), (high,) = np.exp(limits(np.log([values]), 0.95))
    assert (found.low, found.median, found.high) == pytest.approx((low, 4.0, high))
    assert 1.0 <= found.low < 2.0
    assert 8.0 < found.high <= 9.0  # between the order statistics that bracket 95%


def test_few_values_reach_beyond_their_extremes_and_many_do_not():
    assert interval([1.0, 1.1]).low < 0.8
    assert interval([1.0, 1.1, 1.2]).low < 1.0 < 1.2 < interval([1.0, 1.1, 1.2]).high
    found = interval(np.linspace(1, 2, 30).tolist())
    assert 1.0 < found.low < found.median < found.high < 2.0


def test_more_confidence_is_a_wider_interval():
    for count in (3, 8, 30):
        values = np.exp(np.random.default_rng(count).standard_normal(count)).tolist()
        widths = [interval(values, confidence=one) for one in (0.5, 0.8, 0.95, 0.99, 0.999)]
        assert [one.low for one in widths] == sorted((one.low for one in widths), reverse=True)
        assert [one.high for one in widths] == sorted(one.high for one in widths)


def test_one_value_says_nothing_of_the_others():
    found = interval([2.0])
    assert (found.low, found.median, found.high) == (0, 2.0, math.inf)
    assert not found.is_known
    assert found.precision == math.inf


def test_equal_values_have_no_width():
    found = interval([0.1] * 7)
    assert found.low == found.median == found.high == 0.1
    assert interval_of_ratio([2.0] * 3, [1.0] * 3).precision == 0


def test_a_ratio_pairs_the_halves_of_each_turn():
    # Prompts differ tenfold, and the second is twice as fast on each of them.
    found = interval_of_ratio([2.0, 20.0, 4.0, 8.0, 200.0, 6.0], [1.0, 10.0, 2.0, 4.0, 100.0, 3.0])
    assert (found.low, found.median, found.high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [1.0, -1.0], [math.nan], [math.inf, 1.0]])
def test_what_is_no_time_is_refused(values):
    with pytest.raises(ValueError, match=r"positive|no median"):
        interval(values)


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="2 values cannot be paired with 1"):
        interval_of_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        interval_of_ratio([1.0, 2.0], [1.0, 0.0])


# --- a machine's drift ---


def clocked(change, noise, count=24, seed=0, prompts=4):
    """Speeds of a machine over 10 minutes: of four prompts, in turns, one of them slow."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0, 600, count)
    work = np.arange(count) % prompts
    speeds = 40 * (1 + change * at / 600) * np.exp(noise * rng.standard_normal(count))
    return at.tolist(), (speeds * (1 + 2 * (work == 0))).tolist(), work.tolist()


def test_a_machine_that_slows_down_is_seen():
    found = drift(*clocked(-0.2, 0.02))
    assert found.change == pytest.approx(-0.2, abs=0.03)
    assert found.is_trend
    assert found.is_too_noisy
    assert "too noisy to tell" in str(found)


def test_noise_is_measured_beside_the_trend():
    for noise in (0.01, 0.05, 0.1):
        found = [drift(*clocked(-0.1, noise, seed=seed)).noise for seed in range(40)]
        assert np.mean(found) == pytest.approx(noise, rel=0.15)


def test_noise_alone_is_rarely_a_trend():
    found = [drift(*clocked(0, 0.05, seed=seed)) for seed in range(200)]
    assert 4 <= sum(one.is_trend for one in found) <= 18  # 5% of 200, and less than 3 deviations
    assert sum(one.is_too_noisy for one in found) <= 10
    assert drift(*clocked(0, 0.5, seed=1)).is_too_noisy


def test_four_values_that_rise_may_do_so_by_chance():
    # Kendall's S is 6 of 4 values and 10 of 5, with deviations of 2.94 and 4.08; S changes by steps
    # of 2, so 1 is taken off before it is held against them.
    assert not drift([0, 1, 2, 3], [10, 11, 12, 13]).is_trend
    assert drift([0, 1, 2, 3, 4], [10, 11, 12, 13, 14]).is_trend


def test_an_outlier_is_neither_noise_nor_trend():
    at, speeds, work = clocked(0, 0.01)
    speeds[-1] /= 10
    found = drift(at, speeds, work)
    assert found.noise < 0.02
    assert not found.is_trend


def test_prompts_that_differ_are_no_noise():
    at, speeds, work = clocked(0, 0.001, prompts=2)
    assert drift(at, speeds, work).noise < 0.002
    assert drift(at, speeds).noise > 0.1  # as if all had done the same


@pytest.mark.parametrize("work", [["a", "b", "c"], ["a", "a", "b"]])
def test_work_that_was_hardly_repeated_says_nothing_of_the_machine(work):
    found = drift([0.0, 1.0, 2.0], [40.0, 10.0, 20.0], work)
    assert not found.is_known
    assert not found.is_too_noisy
    assert str(found).startswith("unknown")


def test_three_values_tell_their_noise():
    rng = np.random.default_rng(0)
    runs = np.exp(0.05 * rng.standard_normal((400, 3))).tolist()
    found = [drift([0.0, 1.0, 2.0], one).noise for one in runs]
    assert np.mean(found) == pytest.approx(0.05, rel=0.15)


# --- what changed ---

RUNS = 400


def verdicts(slowdown, *, turns, noise=0.03, wobble=0.005, comparisons=1):
    """Verdicts on pairs of runs: each turn has noise, and each run a level of its own."""
    rng = np.random.default_rng(turns)
    prompts = 40 * np.exp(0.3 * rng.standard_normal((RUNS, turns)))

    def run():
        level = np.exp(wobble * rng.standard_normal((RUNS, 1)))
        return prompts * level * np.exp(noise * rng.standard_normal((RUNS, turns)))

    before, after = run(), (1 - slowdown) * run()
    return [change(a, b, comparisons=comparisons) for a, b in zip(before, after, strict=True)]


def share(found, *wanted):
    return np.mean([one.verdict in wanted for one in found])


@pytest.mark.parametrize(("turns", "noise"), [(9, 0.03), (18, 0.05), (40, 0.05)])
def test_a_slowdown_of_10_percent_is_found(turns, noise):
    found = verdicts(0.10, turns=turns, noise=noise)
    assert share(found, Verdict.SLOWER) > 0.95
    assert np.mean([one.is_regression(0.05) for one in found]) > 0.95
    assert not any(one.is_regression(0.2) for one in found)


@pytest.mark.parametrize("turns", [3, 9, 40])
def test_a_slowdown_of_1_percent_is_not_called(turns):
    found = verdicts(0.01, turns=turns)
    assert share(found, Verdict.SLOWER, Verdict.FASTER) < 0.05
    assert np.mean([one.is_regression(0.05) for one in found]) < 0.03


@pytest.mark.parametrize("turns", [3, 6, 9, 30])
@pytest.mark.parametrize("noise", [0.03, 0.15])
def test_false_alarms_are_rare(turns, noise):
    assert share(verdicts(0, turns=turns, noise=noise), Verdict.SLOWER, Verdict.FASTER) < 0.05


def test_many_comparisons_share_their_false_alarms():
    found = verdicts(0, turns=8, noise=0.1, wobble=0.0, comparisons=20)
    alarms = np.array([one.verdict in (Verdict.SLOWER, Verdict.FASTER) for one in found])
    assert alarms.reshape(-1, 20).any(axis=1).mean() < 0.16  # 5% of 20 groups, and two deviations
    assert share(verdicts(0.10, turns=30, comparisons=20), Verdict.SLOWER) > 0.95


def test_a_change_of_nothing_is_said_to_be_the_same():
    assert share(verdicts(0, turns=40, noise=0.01, wobble=0), Verdict.SAME) > 0.95
    assert share(verdicts(0, turns=3, noise=0.1), Verdict.UNCLEAR) > 0.9


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [
        (0.97, Verdict.SLOWER),
        (0.985, Verdict.SAME),
        (1.015, Verdict.SAME),
        (1.03, Verdict.FASTER),
    ],
)
def test_what_is_certain_and_matters_is_called_both_ways(factor, verdict):
    rng = np.random.default_rng(0)
    before = 40 * np.exp(0.3 * rng.standard_normal(12))
    after = factor * before * np.exp(0.001 * rng.standard_normal(12))
    assert change(before.tolist(), after.tolist()).verdict is verdict


def test_two_turns_that_agree_by_chance_are_not_judged():
    assert change([40.0, 40.0], [30.0, 30.0]).verdict is Verdict.UNCLEAR
    assert change([40.0] * 3, [30.0] * 3).verdict is Verdict.SLOWER


def test_a_machine_that_drifts_takes_more_to_be_called():
    before, after = [40.0, 41.0, 39.0] * 4, [36.0, 37.0, 35.0] * 4
    assert change(before, after).verdict is Verdict.SLOWER
    assert change(before, after, unsteady=0.12).verdict is Verdict.UNCLEAR
    assert change(after, before).verdict is Verdict.FASTER
