"""What rounds take is told from reads, on a made-up host and device."""

from __future__ import annotations

import random

import pytest

from mlxspec.control import PLAIN, Choice
from mlxspec.stopwatch import FEW, Stopwatch

DRAFTING = Choice("model", 2)


def simulated(
    device_s: float, host_s: float, *, hiccups: float = 0.0, choices: list[Choice] | None = None
) -> dict[Choice, list[float]]:
    """Rounds that a device takes `device_s` for, a second one in flight, and a host `host_s`."""
    watch, rng = Stopwatch(in_step=False), random.Random(0)
    now, device_free = 0.0, 0.0
    done: list[tuple[Choice, float]] = []
    found: dict[Choice, list[float]] = {}
    for i in range(400):
        choice = choices[i % len(choices)] if choices else PLAIN
        while len(done) < 2:
            device_free = max(device_free, now) + device_s * (2 if choice == DRAFTING else 1)
            done.append((choice, device_free))
        read, ready = done.pop(0)
        waited = max(ready - now, 0.0)
        now += waited
        took = watch.read(read, waited_s=waited, now_s=now, fair=True)
        if took is not None:
            found.setdefault(took.choice, []).append(took.seconds)
        now += host_s + (device_s * 5 if rng.random() < hiccups else 0.0)
    return found


def test_a_device_that_is_always_waited_for() -> None:
    (times,) = simulated(1.0, 0.1).values()
    assert times == pytest.approx([1.0] * len(times))
    assert len(times) > 390


def test_a_host_that_is_the_slower_one() -> None:
    (times,) = simulated(1.0, 3.0).values()
    assert times == pytest.approx([3.0] * len(times))
    assert len(times) > 390 / FEW


def test_a_host_that_is_late_at_times_makes_no_round_look_quick() -> None:
    (times,) = simulated(1.0, 0.1, hiccups=0.1).values()
    assert min(times) > 0.99
    assert sorted(times)[len(times) // 2] == pytest.approx(1.0)


def test_rounds_of_another_kind_are_not_mixed_in() -> None:
    found = simulated(1.0, 0.1, choices=[PLAIN] * 5 + [DRAFTING] * 5)
    assert set(found) == {PLAIN, DRAFTING}
    assert found[PLAIN] == pytest.approx([1.0] * len(found[PLAIN]))
    assert found[DRAFTING] == pytest.approx([2.0] * len(found[DRAFTING]))


def test_what_was_built_on_the_way_is_not_counted() -> None:
    watch = Stopwatch(in_step=False)
    at = [0.0, 1.0, 9.0, 9.1, 10.1, 11.1]
    fair = [True, True, False, True, True, True]
    waits = [0.0, 0.9, 0.0, 0.0, 0.9, 0.9]
    took = [
        watch.read(PLAIN, waited_s=wait, now_s=now, fair=one)
        for now, one, wait in zip(at, fair, waits, strict=True)
    ]
    assert [one is not None for one in took] == [False, False, False, False, False, True]
    assert took[-1] == (PLAIN, pytest.approx(1.0))


def test_after_a_stop_it_begins_anew() -> None:
    watch = Stopwatch(in_step=True)
    watch.read(PLAIN, waited_s=0, now_s=1.0, fair=True)
    watch.stop()
    assert watch.read(PLAIN, waited_s=0, now_s=50.0, fair=True) is None
    assert watch.read(PLAIN, waited_s=0, now_s=51.0, fair=True) == (PLAIN, 1.0)
