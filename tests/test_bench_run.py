"""A benchmark's turns: what is written, counted, compared, and what is left when it ends early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import pytest
from architectures import build
from conftest import CHAT_TOKENIZER, TOKENIZER, draft_for

from mlxspec.bench.arms import Asked, Clock, OwnArm, Place, Written, own_arms
from mlxspec.bench.cells import Configuration, Sample
from mlxspec.bench.concluding import results_of
from mlxspec.bench.judging import recommendation, remarks
from mlxspec.bench.measuring import Run
from mlxspec.bench.plan import PLAIN, Group, Settings, configurations, planned
from mlxspec.bench.prompt_sets import Prompt
from mlxspec.bench.results import Drift, Peer, of_json
from mlxspec.bench.summing import Series, is_settled, speedup_of
from mlxspec.control.estimates import Learned
from mlxspec.decode.engine import Engine
from mlxspec.drafters.history import History
from mlxspec.errors import MlxspecError, OutOfMemory
from mlxspec.metrics import SpeculationStats
from mlxspec.pairs.loading import bytes_of

PROMPTS = tuple(
    Prompt(f"{kind}{at}", kind, (f"{kind} number {at}",)) for kind in "ab" for at in range(4)
)
THREE = Configuration(name="3", draft_tokens=3)
SEVEN = Configuration(name="7", draft_tokens=7)


class Made(OwnArm):
    """An arm that writes at once, with the speed that it is told, and keeps the order of all."""

    def __init__(self, configuration, engine, speed, order, *, tokens=(1, 2)):
        super().__init__(configuration, engine, {}, 0)
        self._speed, self._order, self._tokens = speed, order, tokens
        self.seeds: list[int] = []

    def write(self, asked: Asked, place: Place) -> Written:
        self._order.append((asked.prompt, self.name))
        self.seeds.append(asked.seed)
        speed = self._speed(place.turn) if callable(self._speed) else self._speed
        stats = SpeculationStats(self.configuration.draft_tokens)
        return Written(
            sample=Sample(
                **place._asdict(),
                prompt=asked.prompt,
                prompt_tokens=3,
                tokens=len(self._tokens),
                tokens_per_second=speed,
                ttft_s=0.1,
                total_s=1.0,
            ),
            texts=["text"],
            tokens=[self._tokens],
            speculation=[stats],
            seconds=1.0,
            rule="greedy",
        )


@pytest.fixture(scope="module")
def target():
    return build("llama", vocabulary=len(TOKENIZER.get_vocab()))


@pytest.fixture(scope="module")
def engine(target):
    return Engine(
        target, draft_for(target, "half"), TOKENIZER, texts=(History,), compiled=False, context=400
    )


def made_run(engine, speeds, *, prompts=PROMPTS, minutes=1.0, peers=(), precision=0.03):
    order: list[tuple[str, str]] = []
    known = {one.name: one for one in (PLAIN, THREE, SEVEN)}
    arms = {name: Made(known[name], engine, speed, order) for name, speed in speeds.items()}
    settings = Settings(minutes=minutes, precision=precision, max_tokens=4)
    groups = planned(settings, [known[name] for name in speeds], prompts)
    told: list[str] = []
    run = Run(arms, groups, prompts, settings, peers=peers, tell=told.append)
    return run, order, told


def concluded(run, prompts=PROMPTS):
    from datetime import UTC, datetime

    results = results_of(
        run, created=datetime.now(UTC), pair={}, prompts=prompts, before={}, after={}
    )
    assert of_json(results.as_json()) == results
    return results


def measured(order: Sequence[tuple[str, str]], prompt: str) -> list[str]:
    return [name for one, name in order if one == prompt]


# --- turns ------------------------------------------------------------------------------


def test_arms_take_turns_in_both_orders_until_each_is_known(engine):
    run, order, _ = made_run(engine, {"none": 10.0, "3": 20.0, "7": 15.0})
    for _ in run:
        pass
    assert run.is_over
    assert [one.turns for one in run.groups] == [4, 4]  # the least, for ratios that never differ
    forwards = ["none", "3", "7"]
    assert measured(order, "a0")[-3:] == forwards  # behind what warms up
    assert measured(order, "a1") == measured(order, "b1") == forwards[::-1]
    assert measured(order, "a2") == measured(order, "b2") == forwards
    (three,) = [one for one in concluded(run).of("configs") if one.configuration == THREE]
    assert three.speedup is not None
    assert (three.speedup.low, three.speedup.median, three.speedup.high) == (2, 2, 2)
    assert three.finished
    assert {sample.turn for sample in three.samples} == {0, 1, 2, 3}
    assert run._arms["3"].seeds == [0, 0, 0, 1, 1, 2, 2, 3, 3]  # one to warm up; then two groups
    places = [one.place for cell in concluded(run).of("configs") for one in cell.samples]
    assert sorted(places)[0] >= 3
    assert len(set(places)) == 24


def test_groups_take_turns_with_each_other(engine):
    run, order, _ = made_run(engine, {"none": 10.0, "3": 20.0})
    for _ in run:
        pass
    prompts = [one for one, _ in order if one != "reference"]
    firsts = list(dict.fromkeys(prompts))
    assert firsts == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_time_ends_what_never_settles(engine):
    speeds = {"none": 10.0, "3": lambda turn: 10.0 + 7 * (turn % 5)}
    run, _, _ = made_run(engine, speeds, minutes=1e-6, precision=1e-5)
    for _ in run:
        pass
    results = concluded(run)
    assert results.finished
    assert not any(one.finished for one in results.of("configs") if one.configuration == THREE)
    assert any(one.kind == "unfinished" for one in results.warnings)


def test_an_interrupted_run_leaves_whole_turns(engine):
    run, order, _ = made_run(engine, {"none": 10.0, "3": 20.0})
    while measured(order, "b2") != ["none"]:  # the other one of its turn is missing
        next(run)
    results = concluded(run)
    assert not results.finished
    for cell in results.of("configs"):
        assert [one.prompt for one in cell.samples].count("b2") == 0
        assert len(cell.samples) == 5
    assert results.recommendation is not None


def test_a_run_of_which_nothing_is_there_has_results(engine):
    run, _, _ = made_run(engine, {"none": 10.0, "3": 20.0})
    results = concluded(run)
    assert not results.finished
    assert [len(one.samples) for one in results.cells] == [0] * 6
    assert results.recommendation is None


def test_one_configuration_alone_has_results(engine):
    run, _, _ = made_run(engine, {"none": 10.0})
    for _ in run:
        pass
    results = concluded(run)
    assert [one.configuration for one in results.of("configs")] == [PLAIN]
    assert results.recommendation is None
    assert all(one.finished for one in results.cells)


def test_what_does_not_fit_is_left_out_and_said(engine):
    prompts = (*PROMPTS, Prompt("a9", "a", ("x" * 500,)), Prompt("c0", "c", ("x" * 500,)))
    run, order, _ = made_run(engine, {"none": 10.0, "3": 20.0}, prompts=prompts)
    for _ in run:
        pass
    assert not {"a9", "c0"} & {prompt for prompt, _ in order}
    words = [one.words for one in concluded(run, prompts).warnings]
    assert any(one.startswith("c: c0 is left out: The prompt has 500 tokens") for one in words)


def test_a_text_that_runs_out_of_memory_ends_its_group_alone(engine):
    run, _, told = made_run(engine, {"none": 10.0, "3": 20.0})
    write = run._arms["3"].write

    def failing(asked, place):
        if asked.prompt == "b1":
            raise OutOfMemory("reading the prompt")
        return write(asked, place)

    run._arms["3"].write = failing
    for _ in run:
        pass
    results = concluded(run)
    assert results.finished
    counts = {(one.row, one.configuration.name): len(one.samples) for one in results.of("prompts")}
    assert counts == {("a", "none"): 4, ("a", "3"): 4, ("b", "none"): 1, ("b", "3"): 1}
    assert len(told) == 1
    assert any(one.words.startswith("b: 4 prompts are left out:") for one in results.warnings)


def test_a_text_that_differs_is_counted_and_said(engine):
    run, _, _ = made_run(engine, {"none": 10.0, "3": 20.0})
    run._arms["3"]._tokens = (1, 3)
    for _ in run:
        pass
    results = concluded(run)
    assert [one.identical for one in results.of("configs")] == [None, 0.0]
    (words,) = [one.words for one in results.warnings if one.kind == "different"]
    assert words.startswith("8 of 8 texts of 3 differ from plain decoding")


# --- peers ------------------------------------------------------------------------------


class Elsewhere:
    """A peer that fails in some turns."""

    beside = False

    def __init__(self, name, failing):
        self.name, self._failing = name, failing
        self.asked: list[int] = []

    def write(self, asked, place):
        self.asked.append(place.turn)
        if (place.turn in self._failing and len(self.asked) > 1) or None in self._failing:
            raise MlxspecError("The stream ended.", hint="Look at the server.")
        arm = Made(PLAIN, None, 5.0, [])
        return arm.write(asked, place)

    def result(self, series, errors, ours):
        samples = series.samples
        return Peer(
            name=self.name,
            status="measured" if samples else "failed",
            words=f"{len(errors)} errors",
            samples=tuple(samples),
            over=speedup_of(samples, ours["none"]),
        )


def test_a_peer_that_fails_loses_that_sample_alone(engine):
    peers = [Elsewhere("good", {1}), Elsewhere("dead", {None})]
    run, _, told = made_run(engine, {"none": 10.0, "3": 20.0}, peers=peers)
    for _ in run:
        pass
    good, dead = concluded(run).peers
    assert (len(good.samples), good.words) == (6, "2 errors")
    assert good.over is not None
    assert good.over.median == 0.5
    assert (dead.status, dead.words) == ("failed", "1 errors")
    assert peers[1].asked == [0]  # once, and never again
    assert told == ["dead is left out: The stream ended."]


# --- real arms --------------------------------------------------------------------------


def written(engine, names, groups, *, prompts=PROMPTS[:3], turns=2):
    chosen = configurations(names, ("model", "history"))
    arms = own_arms(engine, chosen, {}, compiled=False)
    settings = Settings(max_tokens=12)
    some = [replace(one, arms=chosen) for one in groups]
    run = Run(arms, some, prompts, settings, tell=lambda line: None)
    for _ in run:
        if all(one.turns >= turns for one in run.groups):
            break
    return {
        (cell.question, cell.row, cell.configuration.name): cell
        for cell in concluded(run, prompts).cells
    }


GROUP = Group(questions=("configs",), arms=(PLAIN,))


def test_every_exact_configuration_writes_the_plain_text_and_counts_what_was_kept(engine):
    names = ["3", "auto", "history:4", "model:auto"]
    cells = written(engine, names, [GROUP])
    for name in names:
        cell = cells["configs", name, name]
        assert cell.identical == 1.0
        assert (cell.rule, cell.exact) == ("greedy", True)
        kept = cell.acceptance
        assert kept is not None
        assert kept.drafted == sum(source.drafted for source in kept.by_source.values())
        assert kept.accepted == sum(kept.accepted_by_position)
        allowed = {"3": {"model"}, "history:4": {"history"}, "model:auto": {"model"}}
        assert set(kept.by_source) <= allowed.get(name, {"model", "history"})
        for sample in cell.samples:
            assert sample.tokens == 12
            assert sample.ttft_s is not None
            assert sample.ttft_s < sample.total_s
            assert sample.tokens_per_second is not None
    three = cells["configs", "3", "3"]
    assert three.round is not None
    parts = three.round.draft_s + three.round.verify_s + three.round.host_s
    assert parts == pytest.approx(three.round.round_s)
    assert three.predicted is not None
    assert three.memory_ratio is not None
    assert cells["configs", "none", "none"].acceptance is None


def test_sampled_texts_are_compared_where_the_seed_decides_them(engine):
    group = replace(GROUP, questions=("sampling",), temperature=0.9)
    cells = written(engine, ["auto", "coupled:3", "block:3", "relaxed:3"], [group])
    rules = {name: cells["sampling", "0.9", name] for name in ("auto", "coupled:3", "block:3")}
    assert [one.identical for one in rules.values()] == [1.0, 1.0, None]
    assert [one.rule for one in rules.values()] == ["coupled", "coupled", "block"]
    relaxed = cells["sampling", "0.9", "relaxed:3"]
    assert (relaxed.identical, relaxed.exact) == (None, False)
    assert cells["sampling", "0.9", "none"].rule == "coupled"


def test_memory_counts_only_the_drafters_of_a_configuration(engine):
    names = ("3", "model:3", "history:3")
    arms = own_arms(engine, configurations(names, ("model", "history")), {}, compiled=False)
    draft = bytes_of(engine.draft)
    spared = {name: arm._spared for name, arm in arms.items()}
    assert spared == {"none": draft, "3": 0, "model:3": 0, "history:3": draft}


def test_all_prompts_are_finished_once_every_type_is(engine):
    run, _, _ = made_run(engine, {"none": 10.0, "3": 20.0})
    for _ in run:
        pass
    run.groups[0].finished = False
    results = concluded(run)
    assert [one.finished for one in results.of("configs")] == [False, False]
    assert [one.finished for one in results.of("prompts")] == [False, False, True, True]


def test_a_cold_start_knows_nothing_and_leaves_nothing(engine):
    arms = own_arms(engine, configurations(["auto", "cold:auto"], ("model",)), {}, compiled=False)
    asked = Asked(prompt="a0", messages=[[{"role": "user", "content": "ab"}]] * 3, max_tokens=12)
    engine.learned = Learned()
    begun = []
    run = engine.run
    engine.run = lambda request: begun.append(dict(engine.learned.by_length)) or run(request)
    try:
        for name in ("cold:auto", "auto", "cold:auto"):
            arms[name].write(asked, Place(0, 0, 0.0))
            begun.append(dict(engine.learned.by_length))
    finally:
        del engine.run
    assert [bool(one) for one in begun] == [False, False, False, True, False, True]


def test_texts_one_after_the_other_share_no_round(engine):
    arms = own_arms(engine, configurations(["3", "serial:3"], ("model",)), {}, compiled=False)
    asked = Asked(prompt="a0", messages=[[{"role": "user", "content": "ab"}]] * 3, max_tokens=12)
    rows = []
    batch = engine.batch
    engine.batch = lambda most: rows.append(most) or batch(most)
    try:
        both = [arms[name].write_beside(asked, Place(0, 0, 0.0)) for name in ("3", "serial:3")]
    finally:
        del engine.batch
    assert rows == [3, 1]
    assert both[0].tokens == both[1].tokens


def test_long_prompts_and_texts_side_by_side(engine):
    groups = [
        replace(GROUP, questions=("context",), context=200),
        replace(GROUP, questions=("rows",), rows=3),
        replace(GROUP, questions=("rows",), rows=1),
    ]
    cells = written(engine, ["3"], groups, turns=1)
    for sample in cells["context", "200", "3"].samples:
        assert 140 <= sample.prompt_tokens <= 200
    for rows in (1, 3):
        cell = cells["rows", str(rows), "3"]
        assert cell.identical == 1.0
        for sample in cell.samples:
            assert sample.tokens == 12 * rows
            assert sample.tokens_per_second == pytest.approx(sample.tokens / sample.total_s)


def test_later_turns_of_a_conversation_have_the_plain_answer_before_them(target):
    engine = Engine(target, draft_for(target, "half"), CHAT_TOKENIZER, compiled=False)
    prompts = (Prompt("a1", "a", ("ab", "bc")),)
    group = replace(GROUP, system="direct")
    cells = written(engine, ["3"], [group], prompts=prompts, turns=2)
    first, second = cells["configs", "3", "3"].samples
    assert (first.prompt, second.prompt) == ("a1", "a1.2")
    assert second.prompt_tokens > first.prompt_tokens + 12
    assert cells["configs", "3", "3"].system == "direct"


# --- figures ----------------------------------------------------------------------------


def test_tokens_of_a_round_arrive_together():
    clock = Clock(started=perf_counter() - 10, arrived=[(1.0, 2), (1.5, 3), (2.0, 2)])
    found = clock.sample(Place(0, 0, 0.0), prompt="p", prompt_tokens=1)
    assert (found.tokens, found.ttft_s) == (7, 1.0)
    assert found.tokens_per_second == pytest.approx(5 / 1.0)
    assert (found.gap_p50_s, found.gap_p95_s) == (0.0, 0.5)  # 0, 0.5, 0, 0, 0.5, 0
    assert found.total_s == pytest.approx(10, abs=1)
    whole = clock.sample(Place(0, 0, 0.0), overall=True, prompt="p", prompt_tokens=1)
    assert whole.tokens_per_second == pytest.approx(7 / whole.total_s)
    for arrived in ([], [(1.0, 3)]):
        alone = Clock(arrived=arrived).sample(Place(0, 0, 0.0), prompt="p", prompt_tokens=1)
        assert alone.tokens_per_second is None


def sample(prompt, turn, speed):
    return Sample(
        turn=turn,
        place=turn,
        at_s=float(turn),
        prompt=prompt,
        prompt_tokens=1,
        tokens=9,
        tokens_per_second=speed,
        ttft_s=0.1,
        total_s=1.0,
    )


def samples(*speeds):
    """Samples of as many prompts as there are lists, a turn for each speed."""
    turns = [(at, speed) for at, some in enumerate(speeds) for speed in some]
    return [sample(f"p{at}", turn, speed) for turn, (at, speed) in enumerate(turns)]


def test_a_prompt_counts_once_however_often_it_was_repeated():
    base = samples([10.0] * 9, [10.0], [10.0])
    found = speedup_of(samples([10.0] * 9, [20.0], [30.0]), base)
    assert found is not None
    assert found.median == 2.0
    assert speedup_of(samples([20.0], [20.0]), samples([10.0], [10.0])) is None
    assert speedup_of(samples([20.0] * 3), samples([10.0] * 3)) is not None


def test_a_group_is_settled_where_only_other_prompts_could_tell_more():
    base = samples(*[[10.0] * 2] * 4)
    unlike = [[10.0] * 2, [15.0] * 2, [20.0] * 2, [30.0] * 2]
    assert is_settled(samples(*unlike), base, 0.03)
    noisy = [[10.0, 12.0], [15.0, 19.0], [20.0, 16.0], [30.0, 37.0]]
    assert not is_settled(samples(*noisy), base, 0.03)
    once = samples(*[one[:1] for one in unlike])
    assert not is_settled(once, samples(*[[10.0]] * 4), 0.03)
    assert is_settled(samples(*[[20.0]] * 4), samples(*[[10.0]] * 4), 0.03)


def test_what_cells_come_to(engine):
    run, _, _ = made_run(engine, {"none": 6.0, "3": 6.1, "7": 3.0})
    for _ in run:
        pass
    results = concluded(run)
    best = results.recommendation
    assert best is not None
    assert best.configuration == PLAIN
    assert best.words.startswith("Do not speculate: the fastest configuration, 3, is 1.02 x")
    kinds = {one.kind for one in results.warnings}
    assert {"slow", "slower"} <= kinds
    (words,) = [one.words for one in results.warnings if one.kind == "slower"]
    assert words.startswith("7 is slower than plain decoding with a (type of prompt) and b")


def test_high_acceptance_without_a_gain_is_explained(engine):
    run, _, _ = made_run(engine, {"none": 20.0, "3": 20.0})
    for _ in run:
        pass
    stats = SpeculationStats(3, rounds=10, full_rounds=10, drafted=30, accepted=27)
    stats.drafted_by_position, stats.accepted_by_position = [10, 10, 10], [10, 9, 8]
    for one in run.groups:
        series: Series = one.series["3"]
        series.speculation, series.seconds = [stats], 2.0
        series.splits = [(0.25, 0.7, 0.05)]
        one.series["none"].speculation = [SpeculationStats(0, rounds=20)]
        one.series["none"].seconds = 1.0
    cells = concluded(run).cells
    three = next(one for one in cells if one.configuration == THREE)
    assert three.acceptance is not None
    assert three.acceptance.accepted_by_position == (20, 18, 16)  # of both groups
    assert three.predicted == pytest.approx(3.7 * 0.05 / (0.2 * 0.95))
    (words,) = [
        one.words
        for one in remarks(cells, recommendation(cells), Drift(), [])
        if one.kind == "no_gain"
    ]
    assert words == (
        "3 keeps 90% of its proposals, 3.70 tokens a round, and is 1.00 x (1.00–1.00) plain "
        "decoding: a round takes 4.0 times as long as a plain token, 2.8 of it verifying, 1.0 "
        "drafting and 0.2 the host."
    )
