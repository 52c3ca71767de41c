"""`generate --batch`: a result for every line, whatever the line, the kill or the pipe."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cli_tools import (
    TerminalRun,
    command,
    environment,
    is_one_error,
    save_model,
    wait_for,
)

COUNT = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = str(save_model(tmp_path_factory.mktemp("models") / "letters"))
    return ("--target", folder, "--draft", folder, "--no-compile")


@pytest.fixture
def many(model: tuple[str, ...], invoke: Any, tmp_path: Path) -> Any:
    """Writes lines as a file, runs the command on it, and returns how it ended."""

    def call(lines: list[Any], *arguments: str) -> Any:
        path = tmp_path / "in.jsonl"
        path.write_text(
            "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
        )
        limits = ("--max-tokens", str(COUNT))
        return invoke("generate", *model, "--batch", str(path), *limits, *arguments)

    return call


def results(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


def test_a_line_gets_what_it_asks_for(many: Any, model: tuple[str, ...], invoke: Any) -> None:
    lines: list[Any] = [
        '"abc"',
        {"prompt": "abc", "id": {"any": 1}, "max_tokens": 3},
        {"prompt": "abc", "temperature": 1.0, "seed": 9, "top_k": 5},
        {"prompt": "abc", "logit_bias": {"3": 100}},
        {"messages": [{"role": "user", "content": "abc"}], "stop": "zz"},
    ]
    ended = many(lines, "--ordered", "--quiet")
    assert ended.code == 0
    found = results(ended.out)
    assert [one["index"] for one in found] == [0, 1, 2, 3, 4]
    assert found[1]["id"] == {"any": 1}
    assert "id" not in found[0]
    alone = ("generate", *model, "--max-tokens", str(COUNT), "--json", "--no-stdin", "abc")
    plain, sampled = (
        invoke(*alone, *some).json for some in ((), ("--temp", "1", "--seed", "9", "--top-k", "5"))
    )
    assert found[0]["text"] == found[4]["text"] == plain["text"]
    assert found[1]["tokens"] == plain["tokens"][:3]
    assert found[2]["text"] == sampled["text"]
    assert found[2]["seed"] == 9
    assert found[3]["tokens"] == [3] * COUNT
    assert found[0]["pair"] == plain["pair"]
    assert set(plain) <= set(found[0])


BAD: list[tuple[Any, str]] = [
    ("nonsense", "no JSON"),
    ("[1]", "neither a string nor an object"),
    ("3", "neither a string nor an object"),
    ({"promt": "a"}, "unknown field 'promt'"),
    ({}, "no prompt"),
    ({"prompt": "a", "messages": []}, "a prompt and messages"),
    ({"prompt": 3}, "its prompt is no text"),
    ({"prompt": "a", "system": 3}, "its system is no text"),
    ({"prompt": "a", "seed": "x"}, "its seed is no whole number"),
    ({"prompt": "a", "seed": 1.5}, "its seed is no whole number"),
    ({"prompt": "a", "temperature": True}, "its temperature is no number"),
    ({"prompt": "a", "temperature": -1}, "temperature is -1"),
    ({"prompt": "a", "top_k": 1.5}, "its top_k is no whole number"),
    ({"prompt": "a", "logit_bias": [1]}, "its logit_bias"),
    ({"prompt": "a", "logit_bias": {"10000000": 1}}, "no token 10000000"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0"),
    ({"prompt": "a", "max_tokens": "many"}, "its max_tokens is no whole number"),
    ({"prompt": "a", "stop": [1]}, "its stop is no text"),
    ({"prompt": "a", "raw": 1}, "its raw is neither true nor false"),
    ({"prompt": "a", "draft_tokens": []}, "draft_tokens is []"),
    ({"prompt": "a", "prediction": []}, "its prediction is no text"),
    ({"prompt": " "}, "prompt is empty"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "no place for a conversation"),
    ({"messages": "abc"}, "no list of turns"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [1]}, "Tool 1 is no function"),
    ({"prompt": "a", "tools": [{"function": {"name": "f"}}]}, "no place for tools"),
    ('"\\ud800"', "Unicode"),
]


def test_a_line_that_cannot_be_used_is_an_error_of_its_own(many: Any) -> None:
    ended = many(['"abc"', *(line for line, _ in BAD), '"abd"'], "--quiet", "--ordered")
    assert ended.code == 1
    assert ended.err == ""
    first, *found, last = results(ended.out)
    for (line, words), result in zip(BAD, found, strict=True):
        assert words in result["error"], line
        assert result["hint"].endswith((".", "}", "]"))
    assert first["tokens"]
    assert last["tokens"]


def test_a_line_may_be_a_whole_conversation_with_tools(invoke: Any, tmp_path: Path) -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    folder = str(save_model(tmp_path / "chat", template=template))
    turns = [("user", "abc"), ("assistant", "def"), ("user", "ghi")]
    messages = [{"role": role, "content": text} for role, text in turns]
    system = {"role": "system", "content": "xyz"}
    tools = [{"type": "function", "function": {"name": "clock"}}]
    lines: list[Any] = [
        {"messages": messages},
        {"messages": [system, *messages]},
        {"messages": messages, "tools": tools},
        {"messages": messages[:2]},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    options = ("--target", folder, "--batch", str(path), "--max-tokens", "2", "--no-compile")
    ended = invoke("generate", *options, "--system", "xyz", "--ordered", "--quiet")
    assert ended.code == 0, ended.out
    system_turn, rest = "system xyz ", "user abc assistant def user ghi "
    assert [one["prompt_tokens"] for one in results(ended.out)] == [
        len(system_turn + rest),
        len(system_turn + rest),
        len("clock" + system_turn + rest),
        len(system_turn + "user abc assistant def"),
    ]


def test_results_come_as_they_are_done_or_in_order(many: Any) -> None:
    lines = [{"prompt": "abc", "max_tokens": 60}, {"prompt": "abc", "max_tokens": 1}]
    assert [one["index"] for one in results(many(lines).out)] == [1, 0]
    assert [one["index"] for one in results(many(lines, "--ordered").out)] == [0, 1]


def test_a_prompt_that_begins_like_another_is_read_from_there(many: Any) -> None:
    lines = [{"prompt": "abcabcabc" + end, "max_tokens": 2} for end in ("x", "y")]
    for arguments, taken in (((), 9), (("--cache-gb", "0"), 0)):
        found = results(many(lines, "--ordered", "--draft-tokens", "2", *arguments).out)
        assert found[1]["cached_prompt_tokens"] >= taken
        assert (found[1]["cached_prompt_tokens"] > 0) == (taken > 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "-", "a prompt"), "A prompt is for one text"),
        (("--batch", "-", "--audit"), "--audit is for one text"),
        (("--batch", "-", "--cache", "x"), "--cache is for one text"),
        (("--ordered", "abc"), "--ordered says nothing without --batch"),
        (("--cache-gb", "1", "abc"), "--cache-gb says nothing without --batch"),
        (("--max-rows", "8", "abc"), "--max-rows says nothing without --batch"),
        (("--resume", "x", "abc"), "--resume says nothing without --batch"),
        (("--batch", "missing.jsonl"), "cannot be read"),
    ],
)
def test_options_that_do_not_go_together(
    invoke: Any, model: tuple[str, ...], arguments: tuple[str, ...], words: str
) -> None:
    ended = invoke("generate", *model, *arguments)
    assert ended.code in (1, 2)
    assert is_one_error(ended.err)
    assert words in ended.err


def test_empty_stdin_is_one_clear_line(invoke: Any, model: tuple[str, ...]) -> None:
    ended = invoke("generate", *model, "--batch", "-", stdin=b"\n\n")
    assert is_one_error(ended.err)
    assert "no prompts in stdin" in ended.err


def test_a_live_line_leaves_the_results_alone(model: tuple[str, ...], tmp_path: Path) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text('"abc"\n' * 40)
    options = ("--batch", str(given), "--max-tokens", "30", "--max-rows", "2")
    with out.open("wb") as stdout, TerminalRun("generate", *model, *options, stdout=stdout) as run:
        run.read_until(lambda output: b"at a time" in output and b"/40" in output)
        wait_for(lambda: out.read_bytes().count(b"\n") >= 2)
        run.interrupt()
        assert run.end() == 130
    found = results(out.read_text())
    assert 2 <= len(found) < 40
    assert f"interrupted: {len(found)} of 40 texts are written" in run.text
    assert '"index"' not in run.text


def test_five_hundred_lines_a_kill_and_a_resume(model: tuple[str, ...], tmp_path: Path) -> None:
    """Every line comes out exactly once, bad ones and a cut result included."""
    lines = [json.dumps({"prompt": "abc"[: 1 + at % 3], "id": f"n{at}"}) for at in range(500)]
    lines[7], lines[300] = "nonsense", '{"prompt": 1}'
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(lines))
    options = ("--max-tokens", "4", "--quiet", "--resume", str(out), "--batch", str(given))
    run = command("generate", *model, *options)

    def start(stdout: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(run, env=environment(), stdin=subprocess.DEVNULL, stdout=stdout)

    with out.open("ab") as stdout, start(stdout) as process:
        deadline = time.monotonic() + 120
        while out.read_bytes().count(b"\n") < 60 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    os.truncate(out, out.stat().st_size - 5)  # as if the kill had come in the middle of a line
    before = out.read_bytes().count(b"\n")
    assert 50 < before < 500
    with out.open("ab") as stdout, start(stdout) as process:
        process.wait(timeout=300)
    assert process.returncode == 1
    found = results(out.read_text())
    sound = [one for one in found if "error" not in one]
    assert sorted(one["index"] for one in sound) == sorted(set(range(500)) - {7, 300})
    assert all(one["id"] == f"n{one['index']}" for one in sound)
    assert {one["index"] for one in found if "error" in one} == {7, 300}
