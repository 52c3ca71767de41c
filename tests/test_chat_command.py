"""`mlxspec chat` as a process: on a terminal whose screen is looked at, and in a pipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyte
import pytest
from cli_tools import PATIENCE_S, TerminalRun, environment, is_one_error
from test_display import Running, Screen, Terminal

from mlxspec.cli.display import open_display
from mlxspec.cli.folding import FoldingText, end_of_blocks, rows_below

TALKER = Path(__file__).with_name("chatting.py")
STEADY = ("--draft-tokens", "2", "--temp", "0", "--top-p", "1")
MARKDOWN = (
    "# Rivers\n\nA **long** answer, 漢字 and emoji 🌧️ 👩‍👩‍👧 too, which wraps.\n\n- one\n- two\n\n"
    "```python\ndef f(x):\n    return x\n```\n\nThe end."
)
THINKING = "<think>\n" + "One thing, then another. " * 8 + "\n</think>\n\nThe answer is **42**."
LONG = "\n\n".join(f"## Part {at}\n\nThis is **part** {at} of it.\n\n- a\n- b" for at in range(12))
ENDLESS = "and so on " * 600


def call(*options: str, replies: tuple[str, ...], context: int | None = None) -> list[str]:
    says = json.dumps({"replies": replies, "context": context})
    return [sys.executable, str(TALKER), says, *STEADY, *options]


class Chat(TerminalRun):
    """A chat on a terminal, and its screen, which tells where its cursor is."""

    def __init__(self, process: list[str], env: dict[str, str], columns: int, lines: int) -> None:
        super().__init__(call=process, env=env, columns=columns, lines=lines)
        self._screen = Screen(columns, lines)
        self._screen.write_process_input = self.type
        self._parser = pyte.ByteStream(self._screen)
        self._shown = 0

    @property
    def screen(self) -> str:
        self._parser.feed(self.output[self._shown :])
        self._shown = len(self.output)
        return "\n".join(row.rstrip() for row in self._screen.display)

    def type(self, keys: str) -> None:
        self.write(keys.encode())

    def until(self, seen: Callable[[str], bool]) -> None:
        self.read_until(lambda _: seen(self.screen))

    def enter(self, text: str) -> str:
        """Type a line, wait until the next prompt is empty, and return what stands between."""
        before = len(_prompts(self.screen))
        self.type(text + "\r")
        self.until(lambda screen: len(_prompts(screen)) > before and _is_ready(screen))
        return self.screen.split("\n>")[-2]


def _prompts(screen: str) -> list[str]:
    return [row.removeprefix(">").strip() for row in screen.split("\n") if row[:1] == ">"]


def _is_ready(screen: str) -> bool:
    return _prompts(screen)[-1:] == [""]


@contextmanager
def talking(
    state: Path,
    *replies: str,
    options: tuple[str, ...] = (),
    columns: int = 80,
    lines: int = 200,
    context: int | None = 4000,
    **changes: str,
) -> Iterator[Chat]:
    process = call(*options, replies=replies, context=context)
    env = environment(XDG_STATE_HOME=str(state), **changes)
    with Chat(process, env, columns, lines) as chat:
        chat.until(_is_ready)
        yield chat


@pytest.fixture
def talk(tmp_path: Path) -> Any:
    return partial(talking, tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    """One chat for tests that leave it with an empty prompt: a process takes a while to start.

    Its screen has lines for all of them, because a prompt that scrolls away is not counted.
    """
    state = tmp_path_factory.mktemp("state")
    with talking(state, "zero", "one", MARKDOWN, THINKING, ENDLESS, lines=1000) as chat:
        yield chat


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    def run(text: str, *options: str, replies: tuple[str, ...]) -> Any:
        return subprocess.run(
            call(*options, replies=replies),
            input=text.encode(),
            env=environment(XDG_STATE_HOME=str(tmp_path)),
            capture_output=True,
            timeout=PATIENCE_S,
        )

    return run


# --- a terminal -------------------------------------------------------------------------


def is_rendered(said: str) -> bool:
    text = "".join(said.split())
    words = ("Rivers", "A long answer, 漢字 and emoji", "• one", "def f(x):", "The end.")
    return (
        "**" not in text
        and "```" not in text
        and all("".join(one.split()) in text for one in words)
    )


def test_an_answer_is_markdown_once_it_is_whole(shared):
    said = shared.enter("tell me 2")
    assert is_rendered(said)
    assert re.search(r"tok/s · acceptance 100% · read \d+ of \d+ prompt tokens", said)


def test_a_narrow_terminal_without_colours_is_readable_too(talk):
    with talk(MARKDOWN, columns=40, NO_COLOR="1") as chat:
        said = chat.enter("tell me")
        assert is_rendered(said)
        assert "\nwhich wraps.\n" in said or "which wraps." in said
        assert "/retry" in chat.enter("/help")
        assert not re.search(r"\x1b\[(3|4)\dm", chat.text)


def test_a_longer_answer_than_the_screen_is_markdown_as_well(talk):
    with talk(LONG, lines=20) as chat:
        chat.type("tell me\r")
        chat.until(lambda screen: "prompt tokens" in screen and _is_ready(screen))
        screen = pyte.HistoryScreen(80, 20, history=1000)
        pyte.ByteStream(screen).feed(chat.output)
        above = ["".join(row[at].data for at in range(80)) for row in screen.history.top]
        rows = [row.rstrip() for row in [*above, *screen.display]]
        chat.type("\x03\x03")
        assert chat.end() == 0
    assert [row for row in rows if row.startswith("Part ")] == [f"Part {at}" for at in range(12)]
    assert not [row for row in rows if "**" in row or "##" in row]


def test_a_reasoning_is_folded_and_can_be_shown_again(shared):
    said = shared.enter("why 3")
    assert re.search(r"\nthought for \d+\.\d s\nThe answer is 42\.\n", said)
    assert "then another" not in said
    assert re.search(r"\x1b\[2mO", shared.text), "it is dim while it streams"
    assert shared.enter("/thoughts").count("then another") == 8


def test_ctrl_c_ends_an_answer_and_keeps_it(shared):
    shared.type("go on 4\r")
    shared.until(lambda screen: "and so on and so on and so on" in screen)
    shared.interrupt()
    shared.until(lambda screen: "interrupted" in screen and _is_ready(screen))
    assert "and so on and so on" in shared.screen.split("\n>")[-2]
    # What was read and written of it is not read again.
    found = re.search(r"read (\d+) of (\d+) prompt tokens", shared.enter("and 1"))
    assert int(found[1]) < 40 < int(found[2])


def test_ctrl_c_clears_a_question_and_twice_at_an_empty_prompt_leaves(talk):
    with talk("It is so.") as chat:
        chat.type("never asked")
        chat.until(lambda screen: "> never asked" in screen)
        chat.type("\x03")
        chat.until(_is_ready)
        assert "once more" not in chat.screen
        chat.type("\x03")
        chat.until(lambda screen: "Ctrl-C once more leaves" in screen and _is_ready(screen))
        assert "It is so." in chat.enter("asked")
        chat.type("\x03")
        chat.until(lambda screen: screen.count("once more leaves") == 2 and _is_ready(screen))
        chat.type("\x03")
        assert chat.end() == 0
    assert "Traceback" not in chat.text


def test_several_lines_are_one_question_and_history_outlasts_a_run(talk):
    with talk("It is so.") as chat:
        chat.type("one\x1b\rtwo")
        chat.until(lambda screen: "> one\n  two" in screen)
        chat.type("\r")
        chat.until(lambda screen: "It is so." in screen and _is_ready(screen))
        chat.type("\x1b[200~three\nfour\x1b[201~")  # a pasted block
        chat.until(lambda screen: "> three\n  four" in screen)
        chat.type("\r")
        chat.until(lambda screen: screen.count("It is so.") == 2 and _is_ready(screen))
        chat.type("\x04")
        assert chat.end() == 0
    with talk("It is so.") as chat:
        chat.type("\x1b[A")
        chat.until(lambda screen: "> three\n  four" in screen)


def test_an_answer_can_be_asked_for_again_edited_and_undone(shared):
    shared.enter("first 0")
    shared.enter("second 1")
    assert "\none\n" in shared.enter("/retry")
    shared.type("/edit\r")
    shared.until(lambda screen: _prompts(screen)[-1] == "second 1")
    assert "\nzero\n" in shared.enter("\x7f0")
    assert "taken back: second 0" in shared.enter("/undo")
    assert "taken back: first 0" in shared.enter("/undo")


def test_a_command_is_completed(shared):
    shared.type("/ret")
    shared.until(lambda screen: "answer the last question again" in screen)
    shared.type("\t")
    shared.until(lambda screen: "> /retry" in screen)
    shared.type("\x03")
    shared.until(_is_ready)


def test_settings_hold_for_the_next_answer(shared):
    assert "temperature 0.7" in shared.enter("/set temp 0.7")
    shared.until(lambda screen: "temp 0.7" in screen.split("\n>")[-1])  # on the line below
    assert "greedy" in shared.enter("/set temp off")
    assert "draft off" in shared.enter("/draft off")
    assert "system: be kind" in shared.enter("/system be kind")
    assert "acceptance" not in shared.enter("why 2")  # an answer of many rounds
    assert "draft 3 tokens a round, by model" in shared.enter("/draft 3")
    assert "acceptance 100%" in shared.enter("/retry")
    assert "audit: identical" in shared.enter("/audit")
    assert "there is no system message" in shared.enter("/system off")
    assert "proposals accepted" in shared.enter("/stats")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("/set temp hot", "It must be a number"),
        ("/set tmp 1", "Did you mean temp"),
        ("/set max_tokens 0", "1 or more"),
        ("/draft many", "neither auto nor in the range"),
        ("/pair nobody", "There is no pair named"),
        ("/stat", "Did you mean /stats"),
        ("/undo now", "takes nothing behind it"),
        ("/save chat.txt", "neither JSON nor Markdown"),
        ("/load none.md", "cannot be read"),
    ],
)
def test_a_wrong_command_is_one_error(shared, wrong, words):
    shared.enter("first 0")
    said = " ".join(shared.enter(wrong).split())
    assert words in said
    assert (said.count("error: "), said.count("hint: ")) == (1, 1)


def test_a_context_that_fills_up_is_told_before_turns_are_left_out(talk):
    with talk("It is so, whatever you say.", context=300) as chat:
        for at in range(7):
            chat.enter(f"question {'abcdefg'[at]}")
    words = " ".join(chat.screen.split())
    nearly, full = words.index("% full,"), words.index("is full: the oldest")
    assert nearly < full
    assert words.count("It is so, whatever") == 7


def test_a_chat_is_saved_and_gone_on_with(shared, tmp_path):
    file = tmp_path / "chat.md"
    shared.enter("why 3")
    assert "saved" in shared.enter(f"/save {file}")
    end = "## User\n\nwhy 3\n\n## Assistant\n\nThe answer is **42**.\n"
    assert file.read_text().endswith(end)
    file.write_text(end)
    shared.enter(f"/load {file}")
    assert "The answer is 42." in shared.enter("/retry")
    assert "taken back: why 3" in shared.enter("/undo")
    assert "There is nothing to take back yet." in shared.enter("/undo")
    shared.enter("first 0")
    (tmp_path / "other.md").write_text("kept")
    assert "exists already" in shared.enter(f"/save {tmp_path / 'other.md'}")
    assert (tmp_path / "other.md").read_text() == "kept"


def test_a_terminal_that_can_do_nothing_still_holds_a_chat(talk):
    with talk(MARKDOWN, TERM="dumb") as chat:
        chat.type("tell me\n")
        chat.until(lambda screen: "The end." in screen and "prompt tokens" in screen)
        assert "\x1b" not in chat.text
        chat.type("/quit\n")
        assert chat.end() == 0


# --- a pipe -----------------------------------------------------------------------------


def test_a_pipe_brings_a_question_on_each_line(pipe):
    ended = pipe("first 0\n\nsecond 1\n/set temp 0\n//x 0", replies=(THINKING, "one\n"))
    assert ended.returncode == 0
    assert ended.stdout.decode() == "The answer is **42**.\none\nThe answer is **42**.\n"
    assert ended.stderr.decode().count("prompt tokens") == 3


def test_json_is_an_object_for_each_answer(pipe):
    ended = pipe("first 0\nsecond 1\n", "--json", "--quiet", replies=(THINKING, "one"))
    first, second = (json.loads(line) for line in ended.stdout.splitlines())
    assert (first["question"], first["text"]) == ("first 0", "The answer is **42**.")
    assert first["reasoning"].startswith("One thing")
    assert second["cached_prompt_tokens"] > 0
    assert ended.stderr == b""


def test_an_error_in_a_pipe_is_told_and_the_next_line_is_read(pipe):
    ended = pipe("/nothing\nfirst 1\n", "--quiet", replies=("zero", "one"))
    assert (ended.returncode, ended.stdout) == (1, b"one\n")
    assert is_one_error(ended.stderr)


def test_a_model_without_a_template_goes_on_with_the_text(invoke):
    ended = invoke(
        "chat",
        *("--no-compile", "--temp", "0", "--max-tokens", "8", "--json"),
        stdin=b"def f(x):\ndef g(x):\n",
    )
    first, second = (json.loads(line) for line in ended.out.splitlines())
    assert len(first["tokens"]) == len(second["tokens"]) == 8
    assert second["prompt_tokens"] > first["prompt_tokens"] + 8


@pytest.mark.parametrize("resized", [False, True])
def test_a_note_waits_for_the_end_and_a_resized_answer_stays_raw(resized, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(40, 20)
    streams = {"stdout": terminal.open(), "stderr": terminal.open()}
    display = open_display(**streams, quiet=False, json=False, writer=FoldingText)
    run = Running(display)
    run.say("**one**\n\n")
    display.note("a note")
    if resized:
        terminal.resize(50, 20)
    run.say("two")
    assert "a note" not in terminal.text()
    display.close()
    first = "**one**" if resized else "one"
    assert terminal.text().split("\n") == [first, "", "two", "a note"]
    terminal.close()


# --- rows and blocks --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", 0),
        ("abcd", 0),
        ("abcde", 1),
        ("abcd\n", 1),
        ("ab漢\nx", 1),
        ("abc漢", 1),
        ("a\tb", 1),
        ("👩‍👩‍👧", None),  # two columns, or six
        ("🌧️", 0),
    ],
)
def test_rows_below_are_known_where_terminals_agree(text, rows):
    assert rows_below(text, 4) == rows


def test_blocks_are_whole_once_another_begins():
    assert end_of_blocks("one\ntwo") == 0
    assert end_of_blocks("one\n\n") == 0
    assert end_of_blocks("one\n\ntwo") == 5
    assert end_of_blocks("- one\n\n  more of it") == 0
    assert end_of_blocks("a\n\n```\n\nb\n\nc") == 3
    assert end_of_blocks("```\n\nb\n```\n\nc") == 12
