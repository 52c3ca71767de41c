"""The controller, on machines and texts that were recorded, and on made-up ones.

T(M)/T(1), what a pass of M rows costs beside one of a single row, as measured with 4-bit weights on
an M1 Ultra, M3 Max, M4 Pro and M5 Max, and with the embedded pair on a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from math import exp, inf
from statistics import mean

import pytest

from mlxspec.control.controller import LAST_RETRY, OPENING, TRIAL_ROUNDS, Controller
from mlxspec.control.estimates import (
    CHEAPEST,
    LENGTH_CLASSES,
    SIZES,
    AcceptanceEstimate,
    Costs,
    Knowledge,
    Learned,
    expected_tokens,
)
from mlxspec.drafters.proposals import PLAIN, Choice, Offer

MOST = 8
DRAFT_STEP, HOST = 0.12, 0.02  # in plain passes
MACHINES = {
    "M1 Ultra": {1: 1.0, 2: 1.7, 4: 3.1, 8: 5.9, 9: 6.6},
    "M3 Max": {1: 1.0, 2: 1.0, 4: 1.28, 6: 2.04, 8: 2.5, 10: 3.9, 32: 3.9},
    "M4 Pro": {1: 1.0, 2: 1.03, 4: 1.47, 8: 2.69, 16: 5.2},
    "M5 Max": {1: 1.0, 3: 1.12, 5: 1.48, 8: 2.25, 16: 3.9},
    "CPU": {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.9, 16: 3.0},
}
# How often position j is accepted once it is reached.
TEXTS = {
    "code": [[0.85] * MOST],
    "prose": [[0.7, 0.62, 0.58, 0.55, 0.5, 0.5, 0.5, 0.5]],
    "poor": [[0.4] + [0.3] * 7],
    "random": [[0.08] * MOST],
    "repetitive": [[0.97] * MOST],
}
TEXTS |= {
    "prose, then code": TEXTS["prose"] + TEXTS["code"],
    "random, then repetitive": TEXTS["random"] + TEXTS["repetitive"],
    "code, random, prose": TEXTS["code"] + TEXTS["random"] + TEXTS["prose"],
}
STRETCH = 150  # tokens, before a changing text changes
SEEDS = range(6)


def rows_cost(machine: str, rows: int) -> float:
    """Between what was measured, and beyond it, along lines."""
    points = sorted(MACHINES[machine].items())
    (a, low), (b, high) = next((two for two in pairwise(points) if rows <= two[1][0]), points[-2:])
    return low + (high - low) * (rows - a) / (b - a)


def round_cost(machine: str, count: int, at_once: float = 0.0) -> float:
    """A round of K = `count`; one pass drafts all of it where that takes `at_once` plain passes."""
    drafting = at_once * (count > 0) if at_once else count * DRAFT_STEP
    return rows_cost(machine, count + 1) + drafting + HOST


@dataclass
class Simulation:
    """Rounds on a machine over a text: whatever drives it is told what came of each."""

    machine: str
    text: str
    seed: int
    tokens: int = 0
    seconds: float = 0.0
    restless: bool = False  # the whole machine is slower at times, for everything alike
    at_once: float = 0.0  # see `round_cost`
    slowness: float = 1.0
    rounds: list[int] = field(default_factory=list)

    def round(self, count: int, rng: random.Random) -> tuple[int, float]:
        stretches = TEXTS[self.text]
        rates = stretches[self.tokens // STRETCH % len(stretches)]
        accepted = 0
        while accepted < count and rng.random() < rates[accepted]:
            accepted += 1
        cost = round_cost(self.machine, count, self.at_once) * exp(rng.gauss(0, 0.04))
        self.tokens += accepted + 1
        self.seconds += cost  # as if the machine were always as fast, to compare runs
        self.rounds.append(count)
        if self.restless and rng.random() < 0.03:
            self.slowness = rng.choice([1.0, 1.0, 1.3, 1.9])
        another_program = 3.0 if rng.random() < 0.005 else 1.0
        return accepted, cost * self.slowness * another_program

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def fixed(machine: str, text: str, seed: int, tokens: int, count: int) -> Simulation:
    rng, run = random.Random(seed), Simulation(machine, text, seed)
    while run.tokens < tokens:
        run.round(count, rng)
    return run


def controlled(
    machine: str,
    text: str,
    seed: int,
    tokens: int,
    controller: Controller | None = None,
    *,
    restless: bool = False,
    at_once: float = 0.0,
    rounds: float = inf,
) -> Simulation:
    """As in a session: a round is chosen before the one before it is read."""
    controller = controller or Controller({"model": MOST})
    rng = random.Random(seed)
    run = Simulation(machine, text, seed, restless=restless, at_once=at_once)
    unread: list[tuple[Choice, int, float]] = []
    while run.tokens < tokens and len(run.rounds) < rounds:
        choice = controller.choose(run.tokens)
        unread.append((choice, *run.round(choice.draft_tokens, rng)))
        if len(unread) > 1:
            choice, accepted, cost = unread.pop(0)
            controller.kept(choice, accepted)
            controller.took(choice, cost)
    return run


@cache
def fixed_speed(machine: str, text: str, tokens: int, count: int) -> float:
    return mean(fixed(machine, text, seed, tokens, count).speed for seed in SEEDS)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_nearly_as_fast_as_the_best_fixed_choice_in_hindsight(machine: str, text: str) -> None:
    best = max(fixed_speed(machine, text, 1000, count) for count in range(MOST + 1))
    found = mean(controlled(machine, text, seed, 1000).speed for seed in SEEDS)
    assert found >= 0.95 * best


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_machine_whose_speed_changes_all_the_time(machine: str, text: str) -> None:
    best = max(fixed_speed(machine, text, 1000, count) for count in range(MOST + 1))
    found = mean(controlled(machine, text, seed, 1000, restless=True).speed for seed in SEEDS)
    assert found >= 0.93 * best
    assert found >= 0.98 * fixed_speed(machine, text, 1000, 0)


@pytest.mark.parametrize("known", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("machine", MACHINES)
def test_never_slower_than_plain_over_200_tokens(machine: str, text: str, known: bool) -> None:
    # What is known is of another text than most.
    costs = tuple(round_cost(machine, count) for count in range(MOST + 1))
    knowledge = {"model": Knowledge(costs, (0.7,) * MOST)} if known else None
    plain = fixed_speed(machine, text, 200, 0)
    found = mean(
        controlled(machine, text, seed, 200, Controller({"model": MOST}, knowledge)).speed
        for seed in SEEDS
    )
    assert found >= 0.98 * plain


def test_the_same_reports_give_the_same_choices() -> None:
    once, again = (controlled("M4 Pro", "prose, then code", 3, 800) for _ in range(2))
    assert once.rounds == again.rounds
    assert len(set(once.rounds)) > 2


def test_it_does_not_flap() -> None:
    run = controlled("M3 Max", "prose", 1, 2000)
    changes = sum(a != b for a, b in pairwise(run.rounds))
    assert changes < len(run.rounds) / 15


HEADS = [0.2, 0.8]  # plain passes that a head's one pass takes: on a GPU, and on a CPU


def of_head(machine: str, text: str, tokens: int, at_once: float, *, rounds: float = inf) -> float:
    """The speed with a head that drafts all of a block in one pass, and is known to."""
    return mean(
        controlled(
            machine,
            text,
            seed,
            tokens,
            Controller({"head": MOST}, at_once={"head"}),
            at_once=at_once,
            rounds=rounds,
        ).speed
        for seed in SEEDS
    )


@pytest.mark.parametrize("at_once", HEADS)
def test_a_head_that_drafts_at_once_finds_its_best_k_soon(at_once: float) -> None:
    gains = []
    for machine, text in product(MACHINES, ("code", "prose", "poor", "repetitive")):
        unaware = mean(
            controlled(machine, text, seed, 1000, at_once=at_once, rounds=40).speed
            for seed in SEEDS
        )
        gains.append(of_head(machine, text, 1000, at_once, rounds=40) / unaware)
    assert min(gains) > 0.92
    if at_once > 0.5:  # with one token alone such a round hardly pays, and with more it does
        assert mean(gains) > 1.2
        assert max(gains) > 1.8
    else:
        assert mean(gains) > 0.99


@pytest.mark.parametrize("at_once", HEADS)
@pytest.mark.parametrize("machine", MACHINES)
def test_a_head_that_drafts_at_once_costs_little_where_nothing_is_kept(
    machine: str, at_once: float
) -> None:
    assert of_head(machine, "random", 200, at_once) >= 0.97 * fixed_speed(machine, "random", 200, 0)


def drive(
    controller: Controller,
    accepted: Callable[[int], int],
    rounds: int,
    machine: str = "M1 Ultra",
) -> list[Choice]:
    """Rounds at exact costs."""
    choices = []
    for _ in range(rounds):
        choice = controller.choose(100)
        controller.kept(choice, min(accepted(choice.draft_tokens), choice.draft_tokens))
        controller.took(choice, round_cost(machine, choice.draft_tokens))
        choices.append(choice)
    return choices


def test_it_begins_plainly_tries_and_parks() -> None:
    controller = Controller({"model": MOST})
    assert controller.parked() is None
    choices = drive(controller, lambda _: 0, 400)
    assert choices[:OPENING] == [PLAIN] * OPENING
    assert choices[OPENING : OPENING + TRIAL_ROUNDS] == [Choice("model", 1)] * TRIAL_ROUNDS
    trials = [
        i
        for i, choice in enumerate(choices)
        if choice != PLAIN and (i == 0 or choices[i - 1] == PLAIN)
    ]
    distances = [b - a for a, b in pairwise(trials)]
    assert distances == sorted(distances)
    assert distances[0] > OPENING
    assert sum(choice != PLAIN for choice in choices) < 12
    parked = controller.parked()
    assert parked is not None
    assert parked.loss > 0.3
    assert parked.retry_in > 0


def test_it_says_when_it_tries_again() -> None:
    controller = Controller({"model": MOST})
    drive(controller, lambda _: 0, 60)
    parked = controller.parked()
    assert parked is not None
    choices = drive(controller, lambda _: 0, parked.retry_in + 1)
    assert set(choices[:-1]) == {PLAIN}
    assert choices[-1] != PLAIN


def test_it_comes_back_when_the_text_does() -> None:
    controller = Controller({"model": MOST})
    drive(controller, lambda _: 0, 200, "M3 Max")
    choices = drive(controller, lambda count: count, 2 * LAST_RETRY, "M3 Max")
    assert choices[-1].draft_tokens >= 1
    assert controller.parked() is None


def test_plain_decoding_that_once_looked_bad_is_tried_again() -> None:
    # The first rounds of all are slow, as on a machine that was asleep.
    controller = Controller({"model": 4})
    used = []
    for i in range(800):
        choice = controller.choose(100)
        controller.kept(choice, choice.draft_tokens)
        slow = 3.0 if i < OPENING else 1.0
        controller.took(choice, (1.0 + 1.5 * choice.draft_tokens) * slow)
        used.append(choice.draft_tokens)
    assert used[20] > 0
    assert used[-1] == 0


def test_a_neighbour_that_once_looked_bad_is_tried_again() -> None:
    controller = Controller({"model": 2})
    used: list[int] = []
    for _ in range(400):
        choice = controller.choose(100)
        controller.kept(choice, choice.draft_tokens)
        # Another program ran when two proposals were tried for the first time.
        slow = 1.8 if choice.draft_tokens == 2 and used.count(2) < 2 else 1.0
        controller.took(choice, (1.0, 1.2, 1.3)[choice.draft_tokens] * slow)
        used.append(choice.draft_tokens)
    assert used[20] == 1
    assert used[-1] == 2


def test_no_more_than_a_drafter_can() -> None:
    controller = Controller({"model": 3})
    for _ in range(100):
        choice = controller.choose(10)
        controller.kept(choice, choice.draft_tokens)
        controller.took(choice, 1 + 0.01 * choice.draft_tokens)
        assert choice.draft_tokens <= 3
    assert choice.draft_tokens == 3


def test_of_two_drafters_the_better_one() -> None:
    controller = Controller({"model": 4, "history": 4})
    used = []
    for _ in range(300):
        choice = controller.choose(10)
        good = choice.drafter == "history"
        controller.kept(choice, choice.draft_tokens if good else 0)
        controller.took(choice, 1 + (0.02 if good else 0.2) * choice.draft_tokens)
        used.append(choice.drafter)
    assert used.count("history") > 200
    assert "model" in used
    assert set(controller.knowledge()) == {"model", "history"}


def test_rounds_that_were_not_timed_change_no_cost() -> None:
    controller = Controller({"model": 2})
    for _ in range(20):
        controller.kept(controller.choose(10), 0)
    assert controller.seconds(PLAIN) is None
    assert controller.knowledge() == {}


def test_what_it_learned_starts_the_next_run() -> None:
    first = Controller({"model": MOST})
    rng, run = random.Random(1), Simulation("M3 Max", "code", 1)
    for _ in range(200):
        choice = first.choose(run.tokens)
        accepted, cost = run.round(choice.draft_tokens, rng)
        first.kept(choice, accepted)
        first.took(choice, cost)
    known = first.knowledge()
    assert known["model"].acceptance[0] == pytest.approx(0.85, abs=0.1)
    ratio = known["model"].costs[1] / known["model"].costs[0]
    assert ratio == pytest.approx(round_cost("M3 Max", 1) / round_cost("M3 Max", 0), rel=0.1)
    second = Controller({"model": MOST}, known)
    assert second.choose(0).draft_tokens == first.current.draft_tokens == 3
    assert Controller({"other": MOST}, known).choose(0) == PLAIN


# --- estimates --------------------------------------------------------------------------


def test_tokens_follow_from_rates() -> None:
    assert expected_tokens([0.5, 0.5, 0.2]) == pytest.approx([1, 1.5, 1.75, 1.8])
    assert expected_tokens([]) == [1]


def test_only_reached_positions_count() -> None:
    acceptance = AcceptanceEstimate(3, [0.5, 0.5, 0.5])
    for _ in range(200):
        acceptance.add(3, 1)  # the first is kept, the second not, the third never reached
    first, second, third = acceptance.rates()
    assert first > 0.95
    assert second < 0.3
    assert third == pytest.approx(second, abs=0.15)


def test_recent_rounds_outweigh_old_ones() -> None:
    acceptance = AcceptanceEstimate(1)
    for accepted in [1] * 100 + [0] * 30:
        acceptance.add(1, accepted)
    assert acceptance.rates()[0] < 0.35
    acceptance.soften(1.0)
    acceptance.add(1, 1)
    assert acceptance.rates()[0] > 0.5


def test_a_slow_machine_moves_the_pace_and_no_ratio() -> None:
    costs = Costs({})
    rng = random.Random(0)
    for i in range(400):
        pace = 1.0 if i < 200 else 1.5
        count = i % 2 * 3
        costs.add(
            "model" if count else "",
            count,
            pace * (1.4 if count else 1.0) * exp(rng.gauss(0, 0.03)),
        )
    assert costs.plain_s == pytest.approx(1.5, rel=0.05)
    assert costs.curve("model", 3)[3] == pytest.approx(1.4, rel=0.05)


def test_what_another_program_takes_is_soon_forgotten() -> None:
    costs = Costs({})
    for i in range(50):
        costs.add("", 0, 10.0 if i == 25 else 1.0)
        costs.add("model", 1, 1.2)
    assert costs.curve("model", 1)[1] == pytest.approx(1.2, rel=0.03)


def test_a_first_measurement_that_was_too_slow_is_given_up() -> None:
    costs = Costs({})
    costs.add("", 0, 9.0)
    for _ in range(10):
        costs.add("", 0, 1.0)
    assert costs.plain_s == pytest.approx(1.0, rel=0.05)


def test_costs_between_and_beyond_what_is_known_lie_on_lines() -> None:
    costs = Costs({"model": Knowledge((2.0, 2.2, 2.4, 4.0), (0.5,))})
    assert costs.measured("model") == 3
    assert costs.curve("model", 5) == pytest.approx([1, 1.1, 1.2, 2.0, 2.333, 2.667], rel=1e-3)
    assert costs.curve("unknown", 1)[1] > 1
    assert not costs.unknown


def test_one_pass_that_drafts_all_tokens_is_paid_once() -> None:
    one = Costs({"head": Knowledge((2.0, 3.6), (0.5,))}, at_once={"head"})
    assert one.curve("head", 3) == pytest.approx([1, 1.8, 2.2, 2.6], rel=1e-3)
    two = Costs({"head": Knowledge((2.0, None, 3.6, None, 4.0), (0.5,))}, at_once={"head"})
    assert two.curve("head", 5) == pytest.approx([1, 1.6, 1.8, 1.9, 2.0, 2.1], rel=1e-3)
    none = Costs({}, at_once={"head"}).curve("head", 2)
    assert 1 < none[1] < none[2] < 2 * none[1] - 1


def test_what_is_known_is_kept_apart_by_length() -> None:
    learned = Learned()
    assert learned.at(10) == {}
    short, long = Knowledge((1.0,), (0.5,)), Knowledge((3.0,), (0.6,))
    learned.learn(10, {"model": short})
    assert learned.at(LENGTH_CLASSES[-1] + 1) == {"model": short}  # better than nothing
    learned.learn(LENGTH_CLASSES[0] + 1, {"model": long})
    assert learned.at(LENGTH_CLASSES[0]) == {"model": short}
    assert learned.at(LENGTH_CLASSES[1]) == {"model": long}
    learned.learn(10, {"history": long})
    assert learned.at(10) == {"model": short, "history": long}
    learned.learn(10, {})
    assert learned.at(10) == {"model": short, "history": long}


def test_a_round_that_seems_cheaper_than_a_plain_one_makes_no_longer_one_free() -> None:
    costs = Costs({"model": Knowledge((1.0, 0.5, 0.6), (0.5,))})
    assert min(costs.curve("model", 200)) >= 0.9
    costs.add("model", 200, 1.0)


def test_a_round_that_was_read_too_late_makes_no_choice_look_cheap() -> None:
    controller = Controller({"model": MOST}, {"model": Knowledge((1.0, 1.3, 1.6), (0.7,))})
    used: list[int] = []
    for i in range(160):
        choice = controller.choose(100)
        # The first rounds of three seem to take no time at all; and soon nothing is kept any more.
        controller.kept(choice, choice.draft_tokens if i < 20 else 0)
        hidden = choice.draft_tokens == 3 and used.count(3) < 2
        controller.took(choice, 0.1 if hidden else 1.0 + 0.3 * choice.draft_tokens)
        used.append(choice.draft_tokens)
    assert used[:20].count(3) > 2
    assert sum(map(bool, used[60:])) < 20
    # Nor does it, where that was kept by an earlier run.
    costs = Costs({"model": Knowledge((1.0, 1.3, 1.6, 0.2), (0.7,))})
    assert costs.curve("model", 3)[3] == pytest.approx(CHEAPEST)


# --- proposals from the text ------------------------------------------------------------

# Where the text proposes, by stretch: how often it is right, and the grade that it has.
COPIES = {
    "always right": [(0.97, 4)],
    "right now and then": [(0.97, 4), (0.3, 1)],
    "sure of itself, and wrong": [(0.05, 4)],
    "not sure, and right": [(0.95, 1)],
    "silent": [None],
}


def with_offers(
    machine: str, text: str, copies: str, seed: int, tokens: int, controller: Controller
) -> Simulation:
    """Rounds whose proposals come from the text where the controller takes them.

    Those that are not taken are counted all the same, four tokens of each.
    """
    rng, run = random.Random(seed), Simulation(machine, text, seed)
    while run.tokens < tokens:
        stretches = COPIES[copies]
        copied = stretches[run.tokens // STRETCH % len(stretches)]
        offers = [] if copied is None else [Offer("history", 31, copied[1])]
        choice = controller.choose(run.tokens, offers)
        if choice.drafter == "history":
            accepted, cost = copied_round(run, copied[0], choice.draft_tokens, rng)
        else:
            accepted, cost = run.round(choice.draft_tokens, rng)
            if copied is not None:
                right = leading_right(copied[0], 4, rng)
                controller.kept(Choice("history", 4, copied[1]), right)
        controller.kept(choice, accepted)
        controller.took(choice, cost)
    return run


def leading_right(rate: float, count: int, rng: random.Random) -> int:
    return next((k for k in range(count) if rng.random() > rate), count)


def copied_round(run: Simulation, rate: float, count: int, rng: random.Random) -> tuple[int, float]:
    accepted = leading_right(rate, count, rng)
    cost = (rows_cost(run.machine, count + 1) + 2 * HOST) * exp(rng.gauss(0, 0.04))
    run.tokens += accepted + 1
    run.seconds += cost
    run.rounds.append(count)
    return accepted, cost


@cache
def copied_speed(machine: str, rate: float, count: int) -> float:
    """Of rounds that always propose so many tokens from the text."""
    expected = expected_tokens([rate] * count)[-1]
    return expected / (rows_cost(machine, count + 1) + 2 * HOST)


@pytest.mark.parametrize("text", ["code", "random"])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_text_that_repeats_is_followed(machine: str, text: str) -> None:
    best = max(copied_speed(machine, 0.97, size) for size in SIZES)
    best = max(best, *(fixed_speed(machine, text, 1000, count) for count in range(MOST + 1)))
    # Where the grade promises little, it takes a while to see that it is better than that.
    for copies, share in (("always right", 0.95), ("not sure, and right", 0.6)):
        speeds = [
            with_offers(machine, text, copies, seed, 1000, Controller({"model": MOST})).speed
            for seed in SEEDS
        ]
        assert mean(speeds) >= share * best


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("machine", MACHINES)
def test_proposals_from_the_text_never_cost_much(machine: str, copies: str) -> None:
    for models in ({}, {"model": MOST}):
        plain = fixed_speed(machine, "random", 200, 0)
        speeds = [
            with_offers(machine, "random", copies, seed, 200, Controller(models)).speed
            for seed in SEEDS
        ]
        # To be wrong at every place where 32 tokens or more agree takes malice.
        assert mean(speeds) >= (0.94 if "wrong" in copies else 0.98) * plain


def test_what_was_offered_is_chosen_only_then() -> None:
    controller = Controller({})
    offer = Offer("history", 5, 4)
    assert controller.choose(10, [offer]) == PLAIN  # what it would be compared with is not known
    controller.took(PLAIN, 1.0)
    assert not controller.wants([[]])
    assert controller.wants([[offer]])
    assert controller.choose(10, [offer]) == Choice("history", 3, 4)  # of so many, 5 is none
    assert controller.choose(10) == PLAIN
    for _ in range(20):
        controller.kept(Choice("history", 4, 4), 0)
    assert not controller.wants([[offer]])
    assert controller.wants([[Offer("prediction", 5, 4)]])  # another one, of which nothing is known
