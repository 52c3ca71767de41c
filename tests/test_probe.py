"""What a probe predicts from what it measured, what it recommends, and what a tuning remembers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_tools import environment, is_one_error, mlxspec, save_model
from conftest import draft_for, foreign, model
from rich.console import Console

from mlxspec.cli.prompts import read_prompts
from mlxspec.cli.report import described, show_probe, show_trial
from mlxspec.control.estimates import SIZES, TEXT
from mlxspec.control.records import Recommendation
from mlxspec.control.replay import Proposed, along_model, rounds
from mlxspec.decode.engine import Engine
from mlxspec.defaults import MAX_AUTO_TOKENS, MODEL
from mlxspec.drafters.history import History
from mlxspec.errors import PromptError, UsageError
from mlxspec.measure.forecast import (
    LEFT_TO_AUTO,
    PLAIN_DECODING,
    TOO_NOISY,
    Contender,
    Forecast,
    MeasuredDrafter,
    Option,
    recommended,
)
from mlxspec.measure.probe import ROWS, TOKENS, agreement, probe, speeds

# Rounds of one, and of two: 0.8 of the first are right, and half of the second.
ROUNDS = {
    1: [Proposed(1, 1)] * 8 + [Proposed(1, 0)] * 2,
    2: [Proposed(2, 2)] * 4 + [Proposed(2, 1)] * 4 + [Proposed(2, 0)] * 2,
    3: [Proposed(3, 2)] * 4 + [Proposed(3, 1)] * 4 + [Proposed(3, 0)] * 2,
}
FROM_TEXT = {3: [Proposed(3, 3), Proposed(0, 0)]}
FOUND = Forecast(
    pass_s={rows: 1.0 + 0.1 * (rows - 1) for rows in ROWS},
    plain_s=1.1,
    noise=0.01,
    drafters={
        MODEL: MeasuredDrafter(step_s=0.1, host_s=0.05, rounds=ROUNDS),
        "history": MeasuredDrafter(step_s=0.0, host_s=0.0, rounds=FROM_TEXT),
    },
)
DEAR = replace(FOUND, pass_s={rows: 0.9 * rows * rows for rows in ROWS})


def printed(show, *arguments) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    show(*arguments, console)
    return console.export_text()


# --- arithmetic -------------------------------------------------------------------------


def test_what_is_expected_follows_from_what_was_measured() -> None:
    plain, one, two, _, text = FOUND.options()
    assert plain == Option("", 0, 1.0, 1.1, 1.0)
    # N(1) = 1 + 0.8; C(1) = 1 draft step + a pass of two rows + the host's share.
    assert (one.drafter, one.draft_tokens) == (MODEL, 1)
    assert one.tokens == pytest.approx(1.8)
    assert one.seconds == pytest.approx(0.1 + 1.1 + 0.05)
    assert one.speed_up == pytest.approx(1.8 * 1.1 / 1.25)
    assert two.tokens == pytest.approx(1 + 0.8 + 0.4)
    assert two.seconds == pytest.approx(0.2 + 1.2 + 0.05)
    # A round of three that are all kept, and one where nothing is proposed.
    assert (text.drafter, text.tokens) == ("history", 2.5)
    assert text.seconds == pytest.approx((1.3 + 1.1) / 2)


def test_the_fastest_is_recommended_and_plain_decoding_where_nothing_pays() -> None:
    best = FOUND.best()
    assert (best.drafter, best.draft_tokens) == ("history", 3)
    model_alone = replace(FOUND, drafters={MODEL: FOUND.drafters[MODEL]})
    assert model_alone.best().draft_tokens == 2
    assert DEAR.best() == DEAR.options()[0]
    hardly = replace(model_alone, plain_s=1.1 * 1.01 / model_alone.best().speed_up)
    assert hardly.best().draft_tokens == 0
    assert replace(FOUND, drafters={}).best().draft_tokens == 0


def test_models_and_auto_are_tried() -> None:
    assert FOUND.contenders(1) == [PLAIN_DECODING, Contender(MODEL, 2), LEFT_TO_AUTO]
    assert len(FOUND.contenders(3)) == 5
    assert replace(FOUND, drafters={}).contenders(1) == [PLAIN_DECODING, LEFT_TO_AUTO]


def test_it_is_what_a_controller_starts_from() -> None:
    known = FOUND.knowledge()
    assert set(known) == {MODEL, TEXT}
    assert known[MODEL].costs == pytest.approx((1.1, 1.25, 1.45, 1.65))
    assert known[MODEL].acceptance == pytest.approx((0.8, 0.6, 0.3))
    assert min(known[MODEL].acceptance) >= 0.01
    assert known[TEXT].costs == pytest.approx((1.1, *(1.0 + 0.1 * k for k in range(1, 32))))
    assert known[TEXT].acceptance == ()


def test_a_verdict_is_what_was_measured() -> None:
    two, three = Contender(MODEL, 2), Contender("small", 3)
    assert recommended({PLAIN_DECODING: 10.0, two: 19.0, three: 18.0}) == Recommendation(2, 1.9)
    assert recommended({PLAIN_DECODING: 10.0, two: 11.0, three: 18.0}) == Recommendation(
        3, 1.8, "small"
    )
    assert recommended({PLAIN_DECODING: 10.0, two: 11.0, LEFT_TO_AUTO: 18.0}) == Recommendation(
        "auto", 1.8
    )
    assert recommended({PLAIN_DECODING: 10.0, two: 10.1}) == Recommendation(0, 1.0)
    assert recommended({PLAIN_DECODING: 10.0, two: 5.0}) == Recommendation(0, 1.0)


def kept(replayed: list[Proposed]) -> list[int]:
    return [one.right for one in replayed]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_what_is_replayed_is_what_rounds_keep(count: int) -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    session = engine.session([1, 2, 3], max_tokens=TOKENS, draft_tokens=count)
    came = []
    while stats := session.step().stats:
        came.append(stats.accepted)
    text = [1, 2, 3], session.text[3:]
    replayed = kept(rounds(along_model(agreement(engine.models[1], text), 8), [count]))
    assert len(replayed) > 5
    assert came[: len(replayed)] == replayed


# --- words ------------------------------------------------------------------------------


def test_a_verdict_in_words() -> None:
    assert "use 3 draft tokens of history: 2.29 x plain decoding" in printed(show_probe, FOUND)
    model_alone = replace(FOUND, drafters={MODEL: FOUND.drafters[MODEL]})
    assert "use 2 draft tokens: 1.67 x plain decoding" in printed(show_probe, model_alone)
    assert "do not speculate" in printed(show_probe, DEAR)
    noisy = printed(show_probe, replace(FOUND, noise=TOO_NOISY + 0.1))
    assert "too busy to tell" in noisy
    assert "use 3" not in noisy
    assert str(Recommendation(1, 1.5)) == "use 1 draft token: 1.50 x plain decoding"
    assert str(Recommendation("auto", 1.5)) == "use --draft-tokens auto: 1.50 x plain decoding"


def test_a_prediction_stands_beside_what_came() -> None:
    two = Contender(MODEL, 2)
    close = printed(show_trial, FOUND, {PLAIN_DECODING: 100.0, two: 165.0, LEFT_TO_AUTO: 170.0})
    words = [line.split() for line in close.splitlines()]
    assert ["model", "2", "165", "1.65", "1.67", "off", "by", "+1%"] in words
    assert ["auto", "170", "1.70"] in words
    assert "busy" not in close
    assert "busy" in printed(show_trial, FOUND, {PLAIN_DECODING: 100.0, two: 90.0})
    assert [described(one) for one in (PLAIN_DECODING, two, LEFT_TO_AUTO)] == [
        "plain",
        "model 2",
        "auto",
    ]


# --- measurements -----------------------------------------------------------------------


def untexted(*arguments: Any, **options: Any) -> Engine:
    """An engine whose prompts are token ids."""
    engine = Engine(*arguments, compiled=False, **options)
    engine.encode = lambda prompt, **_: list(prompt)  # type: ignore[method-assign, assignment]
    return engine


PROMPTS: Any = [[1, 2, 3], [4, 5]]


def test_everything_is_measured() -> None:
    target = model("llama")
    found = probe(untexted(target, draft_for(target, "half"), texts=(History,)), PROMPTS)
    assert tuple(found.pass_s) == ROWS
    assert all(seconds > 0 for seconds in found.pass_s.values())
    assert found.plain_s > 0
    assert found.noise >= 0
    assert list(found.drafters) == [MODEL, "history"]
    drafted, texts = found.drafters.values()
    assert drafted.step_s > 0
    assert list(drafted.rounds) == list(range(1, MAX_AUTO_TOKENS + 1))
    assert all(0.3 < drafted.acceptance(count)[0] < 0.95 for count in drafted.rounds)
    assert not texts.is_model
    assert list(texts.rounds) == list(SIZES)
    assert len(found.options()) == 1 + MAX_AUTO_TOKENS + len(SIZES)
    json.dumps(found.as_dict())


def test_a_draft_that_always_agrees_is_accepted_everywhere() -> None:
    target = model("llama")
    engine = untexted(target, target)
    drafted = probe(engine, PROMPTS).drafters[MODEL]
    assert drafted.acceptance(MAX_AUTO_TOKENS) == (1.0,) * MAX_AUTO_TOKENS
    contenders = [PLAIN_DECODING, Contender(MODEL, 3), LEFT_TO_AUTO]
    measured = speeds(engine, PROMPTS, contenders, repeats=1)
    assert list(measured) == contenders
    assert all(speed > 0 for speed in measured.values())


def test_a_draft_of_another_tokenizer_is_probed_in_the_targets_tokens() -> None:
    target = model("llama")
    draft, shared = foreign(target)
    found = probe(untexted(target, draft, shared=shared), PROMPTS)
    assert found.drafters[MODEL].acceptance(MAX_AUTO_TOKENS) == (1.0,) * MAX_AUTO_TOKENS


def test_every_draft_is_probed() -> None:
    target = model("llama")
    engine = untexted(target, {"one": draft_for(target, "never"), "two": target})
    found = probe(engine, PROMPTS)
    assert found.drafters["one"].acceptance(1)[0] < 0.1
    assert found.drafters["two"].acceptance(1) == (1.0,)
    assert set(found.knowledge()) == {"one", "two", TEXT}
    assert set(speeds(engine, PROMPTS, [Contender("two", 2)], repeats=1)) == {Contender("two", 2)}


def test_a_target_alone_is_probed_with_its_text() -> None:
    found = probe(untexted(model("llama"), texts=(History,)), PROMPTS)
    assert list(found.drafters) == ["history"]
    assert set(found.knowledge()) == {TEXT}


def test_something_must_draft() -> None:
    with pytest.raises(UsageError, match="nothing to probe"):
        probe(Engine(model("llama"), compiled=False), ["x"])


# --- the commands -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "letters"))


@pytest.fixture
def table(folder: str, tmp_path: Path) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(f'[mine]\ntarget = "{folder}"\ndraft = "{folder}"\n')
    return path


def test_probe_prints_tables(folder: str) -> None:
    run = mlxspec("probe", "--target", folder, "--draft", folder, "--no-compile")
    assert run.returncode == 0, run.stderr
    for words in ("T(M)/T(1)", "a round brings", "model", "history", "expected", "tried", "auto"):
        assert words in run.stdout.decode()


def test_tune_remembers_what_it_found(table: Path, tmp_path: Path) -> None:
    env = environment(XDG_STATE_HOME=str(tmp_path / "state"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef ghi\n")
    options = ("--models", str(table))
    for _ in range(5):  # on a machine that is too busy nothing is remembered
        run = mlxspec(
            "tune", "--pair", "mine", *options, "--no-compile", "--prompts", str(prompts), env=env
        )
        assert run.returncode == 0, run.stderr
        if b"not remembered" not in run.stdout:
            break
    assert b"remembered: " in run.stdout
    shown = mlxspec("pairs", "show", "mine", *options, "--json", env=env)
    (kept,) = json.loads(shown.stdout)["learned"]
    assert set(kept["verdict"]) == {"draft_tokens", "speed_up", "drafter"}
    assert len(kept["learned"]["0"]["model"]["costs"]) == MAX_AUTO_TOKENS + 1
    said = mlxspec("pairs", "show", "mine", *options, env=env).stdout.decode()
    measured = [line.split() for line in said.splitlines() if line.rstrip().endswith("%")]
    assert [row[-4] for row in measured] == [str(k) for k in range(1, MAX_AUTO_TOKENS + 1)]
    assert str(Recommendation(**kept["verdict"])) in said
    # A run begins with it, and adds to it.
    run = mlxspec("generate", "--pair", "mine", *options, "--no-compile", "abc", env=env)
    assert run.returncode == 0
    again = mlxspec("pairs", "show", "mine", *options, "--json", env=env)
    (after,) = json.loads(again.stdout)["learned"]
    assert after["learned"] != kept["learned"]
    assert after["verdict"] == kept["verdict"]


def test_a_damaged_memory_is_a_warning_and_no_more(table: Path, tmp_path: Path) -> None:
    state = tmp_path / "state" / "mlxspec"
    state.mkdir(parents=True)
    (state / "tuning.json").write_text("not json")
    env = environment(XDG_STATE_HOME=str(tmp_path / "state"))
    run = mlxspec(
        "generate", "--pair", "mine", "--models", str(table), "--no-compile", "abc", env=env
    )
    assert run.returncode == 0
    assert b"is damaged" in run.stderr
    assert b"Traceback" not in run.stderr
    assert json.loads((state / "tuning.json").read_text())["records"]


def test_a_target_alone_is_probed_by_the_command(folder: str) -> None:
    run = mlxspec("probe", "--target", folder, "--no-compile", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["pass_over_first"]["1"] == 1
    assert result["options"][0]["draft_tokens"] == 0
    assert set(result["drafters"]) == {"history"}
    assert set(result["measured_tokens_per_second"]) == {"plain", "auto"}


def test_without_speculation_there_is_one_error(folder: str) -> None:
    run = mlxspec("probe", "--target", folder, "--no-speculation")
    assert run.returncode == UsageError.exit_code
    assert is_one_error(run.stderr)


# --- files of prompts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n\n two\n", ["one", " two"]),
        ('["one", "two\\nlines"]', ["one", "two\nlines"]),
        ('[{"text": "one", "x": 1}]', ["one"]),
        ('{"prompt": "one"}\r\n\r\n{"text": "two"}\r\n', ["one", "two"]),
        ('{"messages": [{"role": "user", "content": "one"}]}', ["one"]),
        ('{\n  "prompt": "one"\n}', ["one"]),
        ('{"prompt": null, "text": "one"}\n{"text": ""}', ["one"]),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', ["a"]),
        ("[1] one\n[2] two", ["[1] one", "[2] two"]),
        ("[ ] one\n[x] two", ["[ ] one", "[x] two"]),
        ("[-] one", ["[-] one"]),
        ('["one"] is a list', ['["one"] is a list']),
        ('{"a": 1} is one', ['{"a": 1} is one']),
        ("[" * 100_000, ["[" * 100_000]),
        ("[INST] one [/INST]\n[INST] two [/INST]\n", ["[INST] one [/INST]", "[INST] two [/INST]"]),
        ("{one}\n", ["{one}"]),
        ('\ufeff["one"]', ["one"]),
        ("\ufeffone\rtwo", ["one", "two"]),
        ("one\u2028more\x0cand\x85on\ntwo", ["one\u2028more\x0cand\x85on", "two"]),
    ],
)
def test_prompts_are_read(tmp_path: Path, content: str, expected: list[str]) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(content.encode())
    assert read_prompts(path) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no prompts in"),
        ("\n \n", "no prompts in"),
        ("[]", "no prompts in"),
        ('[""]', "no prompts in"),
        ("[1]", "no prompt where entry 1"),
        ('["a", {"x": 1}]', "no prompt where entry 2"),
        ('\n{"prompt": "a"}\n\nb', "no prompt where line 4"),
        ("[", "begins as a JSON list and is none: expecting value: line 1"),
        ('["a", "b",]', "begins as a JSON list"),
        ('[\n"a"\n"b"]', "begins as a JSON list and is none: expecting ',' delimiter: line 3"),
        ('["a \\ud800"]', "half of a character in entry 1"),
    ],
)
def test_files_without_prompts(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "prompts"
    path.write_text(content)
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(path)
    for content, encoding in [("é", "latin1"), ("one", "utf-16")]:
        path.write_bytes(content.encode(encoding))
        with pytest.raises(PromptError, match="not valid UTF-8") as caught:
            read_prompts(path)
        assert f"iconv -f {encoding} " in caught.value.hint
