"""What a benchmark measures: configurations by name, groups, prompts, and the order of turns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlxspec.bench import prompt_sets
from mlxspec.bench.cells import Configuration
from mlxspec.bench.group_run import GroupRun
from mlxspec.bench.plan import (
    NO_TYPES,
    PLAIN,
    Group,
    Settings,
    configuration,
    configurations,
    planned,
    steps_of,
    without_systems,
)
from mlxspec.bench.prompt_sets import Prompt, ledger, mixed, shipped, spec_bench
from mlxspec.errors import PromptError, UsageError

DRAFTERS = ("model", "history")
AUTO = Configuration(name="auto", draft_tokens=0, auto=True)
FEW = (
    Prompt("a1", "a", ("one",)),
    Prompt("a2", "a", ("two", "and then")),
    Prompt("b1", "b", ("three",)),
)


# --- configurations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", PLAIN),
        ("0", PLAIN),
        ("3", Configuration(name="3", draft_tokens=3)),
        ("auto", AUTO),
        ("history:5", Configuration(name="history:5", draft_tokens=5, drafter="history")),
        ("block:3", Configuration(name="block:3", draft_tokens=3, rule="block")),
        (
            "model:coupled:auto",
            Configuration(
                name="model:coupled:auto",
                draft_tokens=0,
                auto=True,
                drafter="model",
                rule="coupled",
            ),
        ),
    ],
)
def test_names_spell_configurations(name, expected):
    assert configuration(name, DRAFTERS) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("three", "'three' is no K"),
        ("-1", "'-1' is no K"),
        ("65", "'65' is no K"),
        ("histroy:5", "no drafter and no rule 'histroy'"),
        ("model:history:5", "no drafter and no rule 'history'"),
        ("none:3", "no drafter and no rule 'none'"),
        ("history:", "'nothing' is no K"),
    ],
)
def test_other_names_are_one_error(name, words):
    with pytest.raises(UsageError) as caught:
        configuration(name, DRAFTERS)
    assert words in caught.value.message.replace("nothing is", "'nothing' is")


def test_a_near_name_is_a_hint():
    with pytest.raises(UsageError) as caught:
        configuration("histroy:5", DRAFTERS)
    assert "Did you mean history?" in caught.value.hint


def test_plain_decoding_is_always_the_first_and_nothing_stands_twice():
    names = [one.name for one in configurations(["3", "none", "3", "auto"], DRAFTERS)]
    assert names == ["none", "3", "auto"]


# --- groups -----------------------------------------------------------------------------


def test_all_arms_meet_on_each_type_and_two_of_them_elsewhere():
    arms = configurations(["3", "auto"], DRAFTERS)
    settings = Settings(
        systems=("none", "direct"), temperatures=(0.0, 0.7), contexts=(64,), rows=(1, 2)
    )
    groups = planned(settings, arms, FEW)
    of_types = [one for one in groups if "configs" in one.questions]
    assert [one.prompt_type for one in of_types] == ["a", "b"]
    assert all(one.arms == arms for one in of_types)
    others = groups[len(of_types) :]
    assert all([arm.name for arm in one.arms] == ["none", "auto"] for one in others)
    asked = [(one.questions, one.system, one.temperature, one.context, one.rows) for one in others]
    assert asked == [
        (("system", "sampling"), "none", 0.0, 0, 1),
        (("system",), "direct", 0.0, 0, 1),
        (("sampling",), "none", 0.7, 0, 1),
        (("context",), "none", 0.0, 64, 1),
        (("rows",), "none", 0.0, 0, 1),
        (("rows",), "none", 0.0, 0, 2),
    ]
    assert len({one.in_words() for one in groups}) == len(groups)


def test_without_types_all_arms_meet_under_the_other_conditions():
    arms = configurations(["3", "serial:3", "cold:auto", "auto"], DRAFTERS)
    serial, cold = arms[2:4]
    assert serial.serial
    assert (cold.cold, cold.auto) == (True, True)
    settings = Settings(contexts=(64,), rows=(2,), types=(NO_TYPES,))
    context, rows = planned(settings, arms, FEW)
    assert [arm.name for arm in context.arms] == ["none", "3", "cold:auto", "auto"]
    assert [arm.name for arm in rows.arms] == ["none", "3", "cold:auto", "auto", "serial:3"]
    first, *_, last = planned(replace(settings, types=()), arms, FEW)
    assert serial not in first.arms
    assert [arm.name for arm in last.arms] == ["none", "auto", "serial:3"]
    with pytest.raises(UsageError, match="serial says nothing here") as caught:
        planned(Settings(), arms, FEW)
    assert "--rows" in caught.value.hint
    with pytest.raises(UsageError, match="cold says nothing here"):
        configurations(["cold:3"], DRAFTERS)


@pytest.mark.parametrize(("names", "main"), [(["auto", "3"], "auto"), (["3", "5"], "5")])
def test_one_setting_meets_plain_decoding_under_other_conditions(names, main):
    last = planned(Settings(rows=(2,)), configurations(names, DRAFTERS), FEW)[-1]
    assert [arm.name for arm in last.arms] == ["none", main]


def test_one_value_holds_for_everything_and_asks_nothing():
    arms = configurations(["3"], DRAFTERS)
    settings = Settings(systems=("expert",), temperatures=(0.7,))
    for one in planned(settings, arms, FEW):
        assert (one.questions, one.system) == (("configs", "prompts"), "expert")
        assert one.temperature == 0.7
    assert planned(Settings(types=(NO_TYPES,)), arms, FEW) == ()


def test_a_model_without_system_messages_keeps_the_other_questions():
    settings = Settings(systems=("none", "direct"), temperatures=(0.0, 0.7), types=(NO_TYPES,))
    groups = without_systems(planned(settings, configurations(["3"], DRAFTERS), FEW))
    assert [(one.questions, one.temperature) for one in groups] == [
        (("sampling",), 0.0),
        (("sampling",), 0.7),
    ]
    only = Settings(systems=("none", "direct"), types=(NO_TYPES,))
    assert without_systems(planned(only, [PLAIN], FEW)) == ()


def test_one_configuration_alone_is_a_plan():
    (group,) = planned(Settings(contexts=(8,), types=(NO_TYPES,)), [PLAIN], FEW)
    assert group.arms == (PLAIN,)


# --- the order of turns -----------------------------------------------------------------


def test_turns_go_forwards_and_backwards_and_each_prompt_does_both():
    arms = configurations(["3", "auto"], DRAFTERS)
    run = GroupRun(Group(questions=("configs",), arms=arms, prompt_type="a"), FEW)
    steps = len(run.steps)
    for turns in (steps, steps + 1):
        run.steps = (run.steps * 2)[:turns]
        backwards = [run.is_backwards(turn) for turn in range(4 * turns)]
        by_step = [{backwards[turn] for turn in range(at, 4 * turns, turns)} for at in range(turns)]
        assert by_step == [{False, True}] * turns
        assert sum(backwards) == 2 * turns
        first = backwards[:turns]
        assert first == [at % 2 == 1 for at in range(turns)]


def test_types_take_turns_and_turns_of_a_prompt_follow_each_other():
    assert [step.id for step in mixed(FEW)] == ["a1", "b1", "a2", "a2.2"]
    group = Group(questions=("configs",), arms=(PLAIN,), prompt_type="a")
    assert [step.id for step in steps_of(group, FEW)] == ["a1", "a2", "a2.2"]
    beside = Group(questions=("rows",), arms=(PLAIN,), rows=2)
    assert [step.id for step in steps_of(beside, FEW)] == ["a1", "b1", "a2"]
    second = mixed(FEW)[-1]
    assert [step.text for step in second.before] == ["two"]


def test_a_step_that_does_not_fit_takes_those_along_that_need_it():
    run = GroupRun(Group(questions=("configs",), arms=(PLAIN,)), FEW)
    run.drop(next(step for step in run.steps if step.id == "a2"), "too long")
    assert [step.id for step in run.steps] == ["a1", "b1"]
    assert run.left_out == ["a2", "a2.2"]


# --- prompts ----------------------------------------------------------------------------


def test_the_shipped_prompts_are_several_of_each_type():
    kinds = [prompt.type for prompt in shipped()]
    assert len(set(kinds)) == 9
    for kind in set(kinds):
        group = Group(questions=("prompts",), arms=(PLAIN,), prompt_type=kind)
        assert len(steps_of(group, shipped())) == 6  # an interval of 95% needs as many
    assert len({prompt.id for prompt in shipped()}) == len(kinds)
    assert all(turn.strip() for prompt in shipped() for turn in prompt.turns)
    assert prompt_sets.systems()["none"] is None
    assert all(text for name, text in prompt_sets.systems().items() if name != "none")


def test_files_of_mt_bench_and_spec_bench_are_read():
    content = "\n".join(
        [
            json.dumps({"question_id": 81, "category": "writing", "turns": ["A\u2028B", "C"]}),
            "",
            json.dumps({"question_id": "x", "turns": ["D"], "reference": ["E"]}),
        ]
    )
    assert prompt_sets.is_spec_bench(content)
    first, second = spec_bench(content, "question.jsonl")
    assert first == Prompt("81", "writing", ("A\u2028B", "C"))
    assert second == Prompt("x", "own", ("D",))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"turns": []}], "Line 1 of"),
        ([{"turns": ["a"]}, {"turns": "ab"}], "Line 2 of"),
        ([{"turns": ["a", 3]}], "Line 1 of"),
        ([{"turns": ["a", " "]}], "Line 1 of"),
        ([{"turns": ["a"]}, "text"], "Line 2 of"),
        ([{"question_id": 1, "turns": ["a"]}] * 2, "two prompts with the id 1"),
        ([], "no prompts in"),
    ],
)
def test_a_damaged_file_is_one_error(lines, words):
    with pytest.raises(PromptError, match=words):
        spec_bench("\n".join(map(json.dumps, lines)), "question.jsonl")
    assert not prompt_sets.is_spec_bench("a text\non two lines")


def test_types_are_chosen_by_name():
    assert [one.id for one in prompt_sets.of_types(FEW, ["b", "a"])] == ["b1", "a1", "a2"]
    with pytest.raises(PromptError, match="no prompts of the type 'codes'"):
        prompt_sets.of_types(shipped(), ["codes"])


def test_the_hash_depends_on_everything_that_is_asked():
    same = prompt_sets.hash_of(FEW)
    assert same == prompt_sets.hash_of(list(FEW))
    changed = (FEW[::-1], FEW[1:], (Prompt("a1", "b", ("one",)), *FEW[1:]))
    assert len({same, *map(prompt_sets.hash_of, changed)}) == 4


@pytest.mark.parametrize("tokens", [60, 500, 4000])
def test_a_long_prompt_is_nearly_as_long_as_asked_and_repeats_no_line(tokens):
    def count(text):
        return len(text.split())

    text = ledger(tokens, 1, count)
    assert tokens - 15 <= count(text) <= tokens
    lines = text.split("\n")[:-2]
    assert len(set(lines)) == len(lines)
    assert ledger(tokens, 1, count) == text != ledger(tokens, 2, count)
