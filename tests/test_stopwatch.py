"""What rounds take is told from when a made-up host comes to know of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from conftest import model, prompt_of

from mlxspec.control.stopwatch import Marks, Stopwatch
from mlxspec.decode.engine import Engine


def simulated(
    rounds_s: Sequence[float], host_s: float, *, blocks: bool = False, hiccups: float = 0.0
) -> list[float | None]:
    """What a stopwatch says of rounds that a device takes so long for, two of them in flight.

    Args:
        host_s: between a read and the next dispatch.
        blocks: dispatching waits until a round is over, as on a CPU.
        hiccups: how often the host is late by five rounds.
    """
    watch, rng = Stopwatch(), random.Random(0)
    now, free, told, dispatched = 0.0, 0.0, [], []
    left = list(rounds_s)
    for _ in rounds_s:
        while len(dispatched) < 2 and left:
            free = max(free, now) + left.pop(0)
            began, now = now, max(now + 0.01 * host_s, free if blocks else 0.0)
            dispatched.append((free, now, now - began))
        over, dispatched_s, dispatching_s = dispatched.pop(0)
        began, now = now, max(now, over)
        marks = Marks(dispatched_s, dispatching_s, now, now - began)
        told.append(watch.took(marks, fair=True))
        now += host_s + (5 * rounds_s[0] if rng.random() < hiccups else 0.0)
    return told


def test_a_device_that_reads_wait_for() -> None:
    told = simulated([1.0] * 50, 0.1)
    assert told[1:] == pytest.approx([1.0] * 49)


def test_a_backend_whose_dispatches_wait() -> None:
    rounds = [1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 3.0, 1.0]
    told = simulated(rounds, 0.0, blocks=True)
    assert told[1:] == pytest.approx(rounds[1:])


def test_rounds_that_differ_are_told_apart() -> None:
    rounds = [1.0, 1.0, 2.0, 2.0, 1.0, 1.5, 1.0]
    assert simulated(rounds, 0.1)[1:] == pytest.approx(rounds[1:])


def test_a_host_that_is_the_slower_one() -> None:
    told = [one for one in simulated([1.0] * 50, 3.0)[3:] if one is not None]
    assert told == pytest.approx([3.0] * len(told), rel=0.02)
    assert len(told) > 40


def test_a_host_that_is_late_at_times_makes_no_round_look_quick() -> None:
    told = [one for one in simulated([1.0] * 400, 0.1, hiccups=0.1) if one is not None]
    assert min(told) > 0.99
    assert sorted(told)[len(told) // 2] == pytest.approx(1.0)
    assert len(told) > 200


def test_what_was_built_on_the_way_is_not_counted() -> None:
    watch = Stopwatch()
    for read_s, fair, expected in ((1.0, True, None), (9.0, False, None), (10.0, True, 1.0)):
        took = watch.took(Marks(0.0, 0.0, read_s, 0.9), fair=fair)
        assert took == expected


def test_after_a_stop_it_begins_anew() -> None:
    watch = Stopwatch()
    watch.took(Marks(0.0, 0.0, 1.0, 0.9), fair=True)
    watch.stop()
    assert watch.took(Marks(0.0, 0.0, 9.0, 0.9), fair=True) is None
    assert watch.took(Marks(0.0, 0.0, 10.0, 0.9), fair=True) == 1.0


def test_a_session_calls_no_round_fair_for_which_something_was_built(monkeypatch) -> None:
    target = model("llama")
    session = Engine(target, target, compiled=False).session(prompt_of(5), draft_tokens=3)
    session._track.draft_tokens = 2
    told = []
    monkeypatch.setattr(
        Stopwatch, "took", lambda self, marks, *, fair: told.append((session.draft_tokens, fair))
    )
    for _ in range(5):
        session.step()
    session._track.draft_tokens = (
        3  # built while the one round in flight runs, which that makes unfair
    )
    for _ in range(4):
        session.step()
    fair = [one for _, one in told]
    assert fair == [False, False, True, True, True, False, False, True, True]


def test_a_round_that_waited_took_the_time_between_two_readings() -> None:
    watch = Stopwatch()
    assert watch.took(Marks(0.0, 0.0, 1.0, 0.9, waited=True), fair=True) is None
    assert watch.took(Marks(1.5, 0.4, 3.0, 0.1, waited=True), fair=True) == 2.0
    assert watch.took(Marks(3.5, 0.1, 4.5, 0.9, waited=True), fair=False) is None
    assert watch.took(Marks(4.9, 0.1, 6.0, 0.9, waited=True), fair=True) == 1.5
    watch.stop()
    assert watch.took(Marks(6.5, 0.1, 9.0, 0.9, waited=True), fair=True) is None
