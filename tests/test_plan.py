"""Measuring within a budget: models whose passes take as long as a made-up clock says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from clocks import Clock, Slowed, growing
from conftest import draft_for, model, prompt_of

from mlxspec.decode.engine import Engine
from mlxspec.defaults import BUDGET_S, MODEL
from mlxspec.drafters.history import History
from mlxspec.measure import plan
from mlxspec.measure.findings import Findings
from mlxspec.measure.forecast import LEFT_TO_AUTO, PLAIN_DECODING, Contender
from mlxspec.measure.plan import ALL, LEAST_SHARE, PARTS_SHARE, PLANS, Pace
from mlxspec.measure.probe import Probe
from mlxspec.measure.schedule import Schedule
from mlxspec.metrics import Progress

PROMPTS: Any = [prompt_of(12), prompt_of(30), prompt_of(20), prompt_of(9)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made_up = Clock()
    monkeypatch.setattr(time, "perf_counter", made_up)
    return made_up


class Pair:
    """A target and a draft on a made-up clock."""

    def __init__(
        self,
        clock: Clock,
        target: Callable[[int], float],
        draft: Callable[[int], float] | None = None,
        *,
        kind: str = "half",
    ) -> None:
        self.clock = clock
        inner = model("llama")
        slow = Slowed(inner, clock, target)
        drafting = None if draft is None else Slowed(draft_for(inner, kind), clock, draft)
        self.engine = Engine(slow, drafting, texts=(History,), compiled=False)

    def probed(self, budget_s: float = BUDGET_S, **options: Any) -> tuple[Findings, float]:
        """The findings, and the seconds that they took by the clock."""
        began = self.clock.now_s
        probe = Probe(self.engine, PROMPTS, budget_s=budget_s, **options)
        for _ in probe:
            pass
        return probe.findings, self.clock.now_s - began


@pytest.mark.parametrize("pass_s", [0.2, 0.6])
def test_a_slow_pair_is_measured_within_the_budget(clock: Clock, pass_s: float) -> None:
    pair = Pair(clock, growing(pass_s, pass_s / 20), growing(pass_s / 10, pass_s / 100))
    findings, took_s = pair.probed()
    assert took_s < BUDGET_S * 1.05
    assert findings.is_whole
    assert findings.forecast is not None
    assert findings.left_out
    assert {1, 2, 5} <= set(findings.forecast.pass_s)
    assert findings.verdict().recommendation is not None
    assert set(findings.tried) >= ({PLAIN_DECODING, LEFT_TO_AUTO} if pass_s < 0.5 else set())


@pytest.mark.parametrize("pass_s", [0.05, 1.0, 8.0])
def test_nothing_more_is_measured_where_nothing_can_pay(clock: Clock, pass_s: float) -> None:
    pair = Pair(clock, growing(pass_s, 0.93 * pass_s), growing(pass_s / 10, pass_s / 10))
    findings, took_s = pair.probed()
    assert took_s <= BUDGET_S
    assert findings.is_settled
    assert not findings.tried
    best = findings.verdict().recommendation
    assert best is not None
    assert best.draft_tokens == 0
    rows = max(findings.forecast.pass_s)
    ratio = (1 + 0.93 * (rows - 1)) / 1
    assert findings.verdict().words == (
        f"do not speculate: a pass over {rows} rows takes {ratio:.2f} times as long as one over 1 "
        f"row, so even if every proposal were right, it would bring {rows / ratio:.2f} x plain "
        "decoding"
    )


def test_two_rows_settle_it_where_more_would_take_too_long(clock: Clock) -> None:
    findings, _ = Pair(clock, growing(2.0, 1.86)).probed()
    assert set(findings.forecast.pass_s) == {1, 2}
    assert "a pass over 2 rows takes 1.93 times as long as one over 1 row" in str(
        findings.verdict().words
    )


def test_two_rows_do_not_settle_it_where_many_rows_are_cheap(clock: Clock) -> None:
    # Matrix products of some backends are by rows up to a number, and in one go from there on.
    findings, _ = Pair(clock, lambda rows: 0.1 * min(rows, 6)).probed()
    assert findings.is_whole
    assert not findings.is_settled


def test_where_not_even_the_least_fits_the_time_that_would_do_is_told(clock: Clock) -> None:
    pair = Pair(clock, growing(2.0, 0.2), growing(0.2, 0.02))
    findings, took_s = pair.probed(30.0)
    assert took_s < 30
    words = findings.verdict().words
    assert findings.verdict().recommendation is None
    assert "a pass over one row takes 2 s here" in words
    enough = float(words.partition("--budget ")[2].split()[0])
    assert Pair(clock, growing(2.0, 0.2), growing(0.2, 0.02)).probed(enough)[0].is_whole


def test_one_draft_token_is_priced_by_the_two_rows_that_a_round_feeds_the_draft(
    clock: Clock,
) -> None:
    # A draft whose passes cost by the row, as those of 16-bit numbers do on a CPU.
    pair = Pair(clock, growing(0.2, 0.1), growing(0.08, 0.08))
    findings, _ = pair.probed(120, candidates=2)
    found = findings.forecast
    assert found is not None
    drafting = found.drafters[MODEL]
    assert (drafting.first_s, drafting.step_s) == pytest.approx((0.16, 0.08), rel=0.01)
    one, *_, four = (option for option in found.options()[1:5])
    assert (one.draft_tokens, four.draft_tokens) == (1, 4)
    assert one.seconds == pytest.approx(0.08 * 2 + 0.3, rel=0.01)
    assert four.seconds == pytest.approx(0.08 * 5 + 0.6, rel=0.01)
    expected = {Contender(each.drafter, each.draft_tokens): each for each in found.options()}
    for contender, speed in findings.tried.items():
        if contender in expected:
            came = speed / findings.tried[PLAIN_DECODING]
            assert expected[contender].speed_up == pytest.approx(came, rel=0.1)


# --- plans ------------------------------------------------------------------------------

PACE = Pace({1: 0.02, 2: 0.021, 8: 0.03, 32: 0.06}, 0.002, 1, building_s=0.05, start=64)


@pytest.mark.parametrize("slower", [1, 3, 10, 30, 100])
@pytest.mark.parametrize("prompts", [[20] * 4, [20, 4000, 30, 25], [9000], [30] * 60])
def test_a_plan_fits(slower: int, prompts: list[int]) -> None:
    pace = replace(
        PACE,
        pass_s={rows: slower * seconds for rows, seconds in PACE.pass_s.items()},
        draft_s=slower * PACE.draft_s,
    )
    taken = plan.chosen(pace, prompts, BUDGET_S)
    if taken is None:
        assert slower == 100
        return
    least = taken.plan == PLANS[-1] and len(taken.prompts) == 1
    share = LEAST_SHARE if least else PARTS_SHARE
    assert sum(taken.parts.values()) <= share * BUDGET_S
    assert taken.prompts
    assert taken.parts == pace.expected(taken.plan, [prompts[at] for at in taken.prompts])


def test_as_many_prompts_are_taken_as_fit() -> None:
    few, many = (plan.chosen(PACE, [30] * 60, seconds) for seconds in (60, 600))
    assert few is not None
    assert many is not None
    assert (many.plan, len(many.prompts)) == (ALL, 60)
    assert 1 <= len(few.prompts) < 60
    short = plan.chosen(replace(PACE, pass_s={1: 0.2, 2: 0.21}), [900, 21, 800, 20], 60)
    assert short is not None
    assert short.prompts == [3]


def test_each_plan_takes_less_than_the_one_before() -> None:
    seconds = [sum(PACE.expected(one, [2000] * one.texts).values()) for one in PLANS]
    assert seconds == sorted(seconds, reverse=True)
    contenders = [PLAIN_DECODING, *(Contender(MODEL, k) for k in range(1, 5)), LEFT_TO_AUTO]
    cost = dict.fromkeys(contenders, 0.02)
    trials = [one.seconds([1.0] * 4, cost) for one in plan.trials(contenders, 4, 96)]
    assert trials[0] == max(trials)
    assert trials[-1] == min(trials) < trials[0] / 50
    assert list(plan.trials([PLAIN_DECODING, LEFT_TO_AUTO], 4, 96))


def test_a_trial_without_a_warm_up_is_for_slow_models() -> None:
    *_, least = plan.trials([PLAIN_DECODING, LEFT_TO_AUTO], 4, 96)
    assert not least.warm_up
    assert least.bears(building_s=0.1, plain_s=0.5)
    assert not least.bears(building_s=0.1, plain_s=0.01)
    assert replace(least, warm_up=True).bears(building_s=0.1, plain_s=0.01)


# --- progress ---------------------------------------------------------------------------


def test_progress_tells_what_how_far_and_how_long(clock: Clock) -> None:
    pair = Pair(clock, growing(0.1, 0.005), growing(0.01, 0.001))
    told = [(clock.now_s, progress) for progress in Probe(pair.engine, PROMPTS)]
    end_s = clock.now_s
    parts = list(dict.fromkeys(progress.what for _, progress in told))
    assert parts == [
        plan.LOOK,
        plan.FIRST_PASSES,
        plan.PASSES,
        plan.TEXTS,
        plan.RUNNING,
        plan.STEPS,
        plan.TRIAL,
    ]
    for part in parts:
        done = [progress.done for _, progress in told if progress.what == part]
        assert done[0] == 0
        assert done == sorted(done)
        assert done[-1] <= next(p.total for _, p in told if p.what == part)
    waits = [after - before for (before, _), (after, _) in pairwise(told)]
    assert max(waits) < 5
    in_trial = [(at, p) for at, p in told if p.what == plan.TRIAL and p.done]
    for at, progress in in_trial[1:]:
        assert progress.left_s == pytest.approx(end_s - at, rel=0.6, abs=2)


def test_a_schedule_goes_by_the_pace_of_the_part_that_runs(clock: Clock) -> None:
    schedule = Schedule(60)
    assert schedule.begin("one", 4).left_s is None
    schedule.expect({"one": 4.0, "two": 10.0})
    assert schedule.begin("one", 4) == Progress("one", 0, 4, 14.0)
    clock.now_s += 2
    assert schedule.after(1).left_s == pytest.approx(6 + 10, abs=0.01)
    assert not schedule.late()
    clock.now_s += 10
    assert schedule.late()
    assert schedule.begin("two", 1).left_s == 10
    assert not schedule.late()
    clock.now_s += 50
    assert schedule.late()
    assert schedule.left_s < 0


# --- what is left of a measurement that a person ends --------------------------------------


def interrupted(steps: Iterator[Progress], part: str, done: int) -> None:
    for progress in steps:
        if (progress.what, progress.done) == (part, done):
            return
    raise AssertionError("it was over before that")


def test_what_was_measured_stays(clock: Clock) -> None:
    pair = Pair(clock, growing(0.2, 0.01), growing(0.02, 0.0))
    probe = Probe(pair.engine, PROMPTS)
    assert probe.findings.verdict().words == "interrupted before anything was settled"
    interrupted(probe, plan.PASSES, 5)
    found = probe.findings.forecast
    assert found is not None
    assert set(found.pass_s) >= {1, 2}
    assert probe.findings.verdict().recommendation is None
    interrupted(probe, plan.TRIAL, 1)
    assert probe.findings.is_whole
    assert probe.findings.tried == {}
    best = probe.findings.verdict().recommendation
    assert best is not None
    assert "(expected, not tried)" in str(best)
    for _ in probe:
        pass
    assert "not tried" not in probe.findings.verdict().words
