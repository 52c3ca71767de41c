"""What a probe predicts from what it measured, what it recommends, and what a tuning remembers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_tools import environment, is_one_error, mlxspec, save_model
from conftest import draft_for, foreign, model
from rich.console import Console

from mlxspec.engine import Engine
from mlxspec.errors import PromptError, UsageError
from mlxspec.estimates import TEXT
from mlxspec.pairs import MAX_AUTO_TOKENS
from mlxspec.probe import (
    CANDIDATES,
    ROWS,
    TOKENS,
    TOO_NOISY,
    Option,
    Probe,
    agreement,
    kept_along,
    knowledge_of,
    probe,
    rates_along,
    speeds,
    verdict_of,
)
from mlxspec.prompts import read_prompts
from mlxspec.report import show_probe, show_trial
from mlxspec.tuning import Verdict

FOUND = Probe(
    pass_s={rows: 1.0 + 0.1 * (rows - 1) for rows in ROWS},
    draft_s=0.1,
    host_s=0.05,
    plain_s=1.1,
    acceptance=((0.8,), (0.8, 0.5), (0.8, 0.5, 0.5), (0.8, 0.5, 0.5, 0.1)),
    noise=0.01,
)
DEAR = replace(FOUND, pass_s={rows: 0.9 * rows for rows in ROWS})


def printed(show, *arguments) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    show(*arguments, console)
    return console.export_text()


# --- arithmetic -------------------------------------------------------------------------


def test_what_is_expected_follows_from_what_was_measured() -> None:
    plain, one, two, *_ = FOUND.options()
    assert plain == Option(0, 1.0, 1.1, 1.0)
    # N(1) = 1 + 0.8; C(1) = 1 draft step + a pass of two rows + the host's share.
    assert one.tokens == pytest.approx(1.8)
    assert one.seconds == pytest.approx(0.1 + 1.1 + 0.05)
    assert one.speed_up == pytest.approx(1.8 * 1.1 / 1.25)
    assert two.tokens == pytest.approx(1 + 0.8 + 0.8 * 0.5)
    assert two.seconds == pytest.approx(0.2 + 1.2 + 0.05)


def test_the_fastest_is_recommended_and_plain_decoding_where_nothing_pays() -> None:
    assert FOUND.best().draft_tokens == 2
    assert FOUND.candidates()[0] == 2
    assert len(set(FOUND.candidates())) == CANDIDATES
    assert DEAR.best() == DEAR.options()[0]
    hardly = replace(FOUND, plain_s=FOUND.plain_s * 1.01 / FOUND.best().speed_up)
    assert hardly.best().draft_tokens == 0


def test_it_is_what_a_controller_starts_from() -> None:
    known = replace(FOUND, acceptance=((0.9,), (0.8, 0.0))).knowledge()
    assert known.costs == pytest.approx((1.1, 1.25, 1.45))
    assert known.acceptance == (0.8, 0.01)


def test_a_verdict_is_what_was_measured() -> None:
    assert verdict_of({0: 10.0, 2: 19.0, 3: 18.0}) == Verdict(2, 1.9)
    assert verdict_of({0: 10.0, 2: 10.1}) == Verdict(0, 1.0)
    assert verdict_of({0: 10.0, 2: 5.0}) == Verdict(0, 1.0)


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [1, 0, 1, 0, 1]), (2, [2, 1, 0]), (3, [2, 1]), (7, [2]), (8, [])]
)
def test_rounds_are_replayed_along_a_text(count: int, kept: list[int]) -> None:
    # Right, right, wrong, right, wrong, …: a round ends with the target's own token.
    along = [True, True, False, True, False, False, True, True]
    assert kept_along(along, count) == kept


def test_every_k_is_counted_in_rounds_of_its_own() -> None:
    # Two right and one wrong, over and over: single proposals meet the wrong one in every other
    # round, rounds of two never.
    along = [[True, True, False] * 40]
    assert rates_along(along, 2) == pytest.approx((1.0, 1.0))
    assert rates_along(along, 1)[0] == pytest.approx(0.5, abs=0.02)
    assert rates_along([[True, False, False] * 40], 2)[1] < 0.5


@pytest.mark.parametrize("count", [1, 3, 8])
def test_what_is_replayed_is_what_rounds_keep(count: int) -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    prompt: str = [1, 2, 3]  # type: ignore[assignment]
    session = engine.session(prompt, max_tokens=TOKENS, draft_tokens=count)
    kept = []
    while session.step():
        assert session.stats is not None
        kept.append(session.stats.accepted)
    replayed = kept_along(agreement(engine, prompt), count)
    assert len(replayed) > 5
    assert kept[: len(replayed)] == replayed


# --- words ------------------------------------------------------------------------------


def test_a_verdict_in_words() -> None:
    assert "use 2 draft tokens: 1.67 x plain decoding" in printed(show_probe, FOUND)
    assert "do not speculate" in printed(show_probe, DEAR)
    noisy = printed(show_probe, replace(FOUND, noise=TOO_NOISY + 0.1))
    assert "too busy to tell" in noisy
    assert "use 2" not in noisy
    assert str(Verdict(1, 1.5)) == "use 1 draft token: 1.50 x plain decoding"


def test_a_prediction_stands_beside_what_came() -> None:
    best = FOUND.best()
    close = printed(show_trial, best, {0: 100.0, 2: 165.0})
    assert "predicted 1.67 x, measured 1.65 x" in close
    assert "busy" not in close
    assert "busy" in printed(show_trial, best, {0: 100.0, 2: 90.0})


# --- measurements -----------------------------------------------------------------------


def test_everything_is_measured() -> None:
    target = model("llama")
    engine = Engine(target, draft_for(target, "half"), compiled=False)
    engine.encode = lambda prompt, **_: list(prompt)  # type: ignore[method-assign, assignment]
    found = probe(engine, [[1, 2, 3], [4, 5]])  # type: ignore[list-item]
    assert tuple(found.pass_s) == ROWS
    assert all(seconds > 0 for seconds in found.pass_s.values())
    assert found.draft_s > 0
    assert found.plain_s > 0
    assert len(found.acceptance) == MAX_AUTO_TOKENS
    assert [len(rates) for rates in found.acceptance] == list(range(1, MAX_AUTO_TOKENS + 1))
    assert all(0.3 < rates[0] < 0.95 for rates in found.acceptance)
    assert found.noise >= 0
    json.dumps(found.as_dict())


def test_a_draft_that_always_agrees_is_accepted_everywhere() -> None:
    target = model("llama")
    engine = Engine(target, target, compiled=False)
    engine.encode = lambda prompt, **_: list(prompt)  # type: ignore[method-assign, assignment]
    found = probe(engine, [[1, 2, 3]])  # type: ignore[list-item]
    assert found.acceptance[-1] == (1.0,) * MAX_AUTO_TOKENS
    assert set(speeds(engine, [[1, 2, 3]], (0, 3), repeats=1)) == {0, 3}  # type: ignore[list-item]


def test_a_draft_of_another_tokenizer_is_probed_in_the_targets_tokens() -> None:
    target = model("llama")
    draft, shared = foreign(target)
    engine = Engine(target, draft, shared=shared, compiled=False)
    engine.encode = lambda prompt, **_: list(prompt)  # type: ignore[method-assign, assignment]
    found = probe(engine, [[1, 2, 3]])  # type: ignore[list-item]
    assert found.acceptance[-1] == (1.0,) * MAX_AUTO_TOKENS


def test_of_several_drafts_the_first_is_probed() -> None:
    target = model("llama")
    engine = Engine(target, {"one": target, "two": draft_for(target, "never")}, compiled=False)
    engine.encode = lambda prompt, **_: list(prompt)  # type: ignore[method-assign, assignment]
    found = probe(engine, [[1, 2, 3]])  # type: ignore[list-item]
    assert found.acceptance[-1] == (1.0,) * MAX_AUTO_TOKENS
    assert set(knowledge_of(found, engine)) == {"one", TEXT}


def test_there_must_be_a_draft() -> None:
    with pytest.raises(UsageError, match="no draft"):
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


def test_probe_prints_a_table_or_one_object(folder: str) -> None:
    arguments = ("probe", "--target", folder, "--draft", folder, "--no-compile")
    run = mlxspec(*arguments)
    assert run.returncode == 0, run.stderr
    for words in ("T(M)/T(1)", "tokens per round", "predicted", "measured"):
        assert words in run.stdout.decode()
    run = mlxspec(*arguments, "--json")
    result = json.loads(run.stdout)
    assert result["pass_over_first"]["1"] == 1
    assert len(result["options"]) == MAX_AUTO_TOKENS + 1
    assert set(result["measured_tokens_per_second"]) == {"0", str(result["best"]["draft_tokens"])}


def test_tune_remembers_what_it_found(table: Path, tmp_path: Path) -> None:
    env = environment(XDG_STATE_HOME=str(tmp_path / "state"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef ghi\n")
    options = ("--models", str(table))
    run = mlxspec(
        "tune", "--pair", "mine", *options, "--no-compile", "--prompts", str(prompts), env=env
    )
    assert run.returncode == 0, run.stderr
    assert b"remembered: " in run.stdout
    shown = mlxspec("pairs", "show", "mine", *options, "--json", env=env)
    (kept,) = json.loads(shown.stdout)["learned"]
    assert set(kept["verdict"]) == {"draft_tokens", "speed_up"}
    assert len(kept["learned"]["0"]["model"]["costs"]) == MAX_AUTO_TOKENS + 1
    said = mlxspec("pairs", "show", "mine", *options, env=env).stdout.decode()
    assert "is accepted" in said
    assert "draft tokens" in said or "do not speculate" in said
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


def test_a_pair_without_a_draft_is_one_error(folder: str) -> None:
    run = mlxspec("probe", "--target", folder)
    assert run.returncode == UsageError.exit_code
    assert is_one_error(run.stderr)


# --- files of prompts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n\n two\n", ["one", " two"]),
        ('["one", "two\\nlines"]', ["one", "two\nlines"]),
        ('[{"text": "one", "x": 1}]', ["one"]),
    ],
)
def test_prompts_are_read(tmp_path: Path, content: str, expected: list[str]) -> None:
    path = tmp_path / "prompts"
    path.write_text(content)
    assert read_prompts(path) == expected


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "[1]", "[", '[{"x": 1}]'])
def test_files_without_prompts(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts"
    path.write_text(content)
    with pytest.raises(PromptError, match="no prompts"):
        read_prompts(path)
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts(tmp_path / "missing")
