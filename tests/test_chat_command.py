"""`mlxspec chat` as a process: on a terminal whose screen is looked at, and in a pipe."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyte
import pytest
from cli_tools import TerminalRun, environment, is_one_error
from talkers import talker
from test_display import Running, Screen, Terminal

from mlxspec.cli import engines
from mlxspec.cli.screen.display import open_display
from mlxspec.cli.screen.folding import FoldingText, end_of_blocks, rows_below
from mlxspec.errors import LoadError

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
def pipe(invoke: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A chat in this process, whose lines come through a pipe."""

    def run(
        *lines: str, replies: tuple[str, ...], options: tuple[str, ...] = (), **says: Any
    ) -> Any:
        monkeypatch.setattr(engines, "load_engine", lambda *_, **__: talker(*replies, **says))
        text = "\n".join(lines).encode()
        return invoke("chat", "--no-compile", *STEADY, *options, stdin=text)

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


def test_keys_lines_and_history(talk):
    with talk("It is so.") as chat:
        chat.type("one\x1b\rtwo")
        chat.until(lambda screen: "> one\n  two" in screen)
        chat.type("\r")
        chat.until(lambda screen: "It is so." in screen and _is_ready(screen))
        chat.type("\x1b[200~three\nfour\x1b[201~")  # a pasted block
        chat.until(lambda screen: "> three\n  four" in screen)
        chat.type("\r")
        chat.until(lambda screen: screen.count("It is so.") == 2 and _is_ready(screen))
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
    with talk(LONG, lines=20) as chat:  # which are fewer than the answer has
        chat.type("\x1b[A\x1b[A")
        chat.until(lambda screen: "> three\n  four" in screen)
        chat.type("\r")
        chat.until(lambda screen: "prompt tokens" in screen and _is_ready(screen))
        screen = pyte.HistoryScreen(80, 20, history=1000)
        pyte.ByteStream(screen).feed(chat.output)
        above = ["".join(row[at].data for at in range(80)) for row in screen.history.top]
        rows = [row.rstrip() for row in [*above, *screen.display]]
        chat.type("\x04")
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


def test_the_line_below_says_what_holds(shared):
    assert "temperature 0.7" in shared.enter("/set temp 0.7")
    shared.until(lambda screen: "temp 0.7" in screen.split("\n>")[-1])
    assert "greedy" in shared.enter("/set temp off")


def test_a_terminal_that_can_do_nothing_still_holds_a_chat(talk):
    with talk(MARKDOWN, TERM="dumb") as chat:
        chat.type("tell me\n")
        chat.until(lambda screen: "The end." in screen and "prompt tokens" in screen)
        assert "\x1b" not in chat.text
        chat.type("/quit\n")
        assert chat.end() == 0


# --- a pipe -----------------------------------------------------------------------------


def test_a_pipe_brings_a_question_on_each_line(pipe):
    lines = ("first 0", "", "second 1", "/set temp 0", "//x 0")
    ended = pipe(*lines, replies=(THINKING, "one\n"))
    assert ended.code == 0
    assert ended.out == "The answer is **42**.\none\nThe answer is **42**.\n"
    assert ended.err.count("prompt tokens") == 3


def test_json_is_an_object_for_each_answer(pipe):
    ended = pipe("first 0", "second 1", replies=(THINKING, "one"), options=("--json", "--quiet"))
    first, second = (json.loads(line) for line in ended.out.splitlines())
    assert (first["question"], first["text"]) == ("first 0", "The answer is **42**.")
    assert first["reasoning"].startswith("One thing")
    assert second["cached_prompt_tokens"] > 0
    assert ended.err == ""


def test_an_error_in_a_pipe_is_told_and_the_next_line_is_read(pipe):
    ended = pipe("/nothing", "first 1", replies=("zero", "one"), options=("--quiet",))
    assert (ended.code, ended.out) == (1, "one\n")
    assert is_one_error(ended.err)


WRONG = {
    "/audit": "nothing to audit",
    "/copy": "nothing to copy",
    "/set temp hot": "It must be a number",
    "/set tmp 1": "Did you mean temp",
    "/set max_tokens 0": "1 or more",
    "/draft many": "neither auto nor in the range",
    "/pair nobody": "There is no pair named",
    "/stat": "Did you mean /stats",
    "/undo now": "takes nothing behind it",
    "/save chat.txt": "neither JSON nor Markdown",
    "/load none.md": "cannot be read",
    "/thoughts": "has no reasoning",
}


def test_a_wrong_command_is_one_error(pipe):
    early, late = list(WRONG)[:2], list(WRONG)[2:]
    ended = pipe(*early, "first 0", *late, replies=("zero",))
    assert ended.code == 1
    told = ended.err.split("error: ")[1:]
    assert len(told) == len(WRONG)
    for (wrong, words), error in zip(WRONG.items(), told, strict=True):
        assert words in " ".join(error.split()), wrong
        assert error.count("hint: ") == 1


def test_settings_hold_for_the_next_answer(pipe):
    lines = (
        "/draft off",
        "/system be kind",
        "why 1",
        "/draft 3",
        "/retry",
        "/audit",
        "/system off",
    )
    ended = pipe(*lines, "/stats", "/help", replies=("zero", "one and two and three"))
    said = ended.err.split("\n")
    assert ended.code == 0, ended.err
    short = [line for line in said if "prompt tokens" in line and "tok/s" in line]
    assert ["acceptance" in line for line in short] == [False, True]
    for words in (
        "draft off",
        "system: be kind",
        "draft 3 tokens a round, by model",
        "audit: identical",
        "there is no system message",
        "proposals accepted",
        "/retry",
    ):
        assert words in ended.err


def test_a_context_that_fills_up_is_told_before_turns_are_left_out(pipe):
    questions = [f"question {one}" for one in "abcdefg"]
    ended = pipe(*questions, replies=("It is so, whatever you say.",), context=300)
    nearly, full = ended.err.index("% full,"), ended.err.index("is full: the oldest")
    assert nearly < full
    assert ended.out.count("It is so, whatever") == 7


def test_a_chat_is_saved_and_gone_on_with(pipe, tmp_path):
    file, other = tmp_path / "chat.md", tmp_path / "other.md"
    other.write_text("kept")
    replies = ("zero", THINKING)
    saved = pipe("why 1", f"/save {file}", f"/save {other}", f"/save {file}", replies=replies)
    assert saved.code == 1
    assert saved.err.count("saved 1 turn") == 2
    assert saved.err.count("exists already") == 1
    assert other.read_text() == "kept"
    end = "## User\n\nwhy 1\n\n## Assistant\n\nThe answer is **42**.\n"
    assert file.read_text() == end
    ended = pipe(f"/load {file}", "/retry", "/undo", "/undo", replies=replies)
    assert ended.out == "The answer is **42**.\n"
    assert "taken back: why 1" in ended.err
    assert "There is nothing to take back yet." in ended.err


def test_an_answer_is_copied_by_the_system_or_by_the_terminal(pipe, tmp_path, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    reply = "<think>hm</think>42, 漢字."
    ended = pipe("why", "/copy", replies=(reply,))
    code = re.search(r"\x1b]52;c;([A-Za-z0-9+/=]+)\x07", ended.err)
    assert base64.b64decode(code[1]).decode() == "42, 漢字.", "without the reasoning"
    assert "7 letters went to the terminal, whose settings" in ended.err
    tool, copied = tmp_path / "pbcopy", tmp_path / "copied"
    tool.write_text(f"#!/bin/sh\n/bin/cat > {copied}\n")
    tool.chmod(0o755)
    ended = pipe("why", "/copy", replies=(reply,))
    assert copied.read_text() == "42, 漢字."
    assert "went to the clipboard" in ended.err
    assert "\x1b]52" not in ended.err
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert "\x1b]52" in pipe("why", "/copy", replies=(reply,)).err, "the next one is tried"


def test_a_chat_goes_on_with_another_pair_and_stays_where_that_fails(invoke, tmp_path, monkeypatch):
    table = tmp_path / "pairs.toml"
    table.write_text("".join(f'["{name}"]\ntarget = "org/{name}"\n' for name in "abc"))
    loaded: list[str] = []

    def load(pair: Any, *_: Any, **__: Any) -> Any:
        loaded.append(pair.name)
        if pair.name == "b":
            raise LoadError("b is broken.", hint="Take another.")
        return talker(f"I am {pair.name}.")

    monkeypatch.setattr(engines, "load_engine", load)
    lines = ("one", "/pair", "/pair b", "two", "/pair c", "three", "/undo", "/undo", "/undo")
    options = ("--models", str(table), "--pair", "a", "--no-compile", *STEADY, "--json")
    ended = invoke("chat", *options, stdin="\n".join(lines).encode())
    answers = [json.loads(line) for line in ended.out.splitlines()]
    assert [one["text"] for one in answers] == ["I am a.", "I am a.", "I am c."]
    assert loaded == ["a", "b", "a", "c"], "the one before is loaded again"
    read = [(one["prompt_tokens"], one["cached_prompt_tokens"]) for one in answers]
    assert read[2][0] > read[1][0] > read[0][0], "the conversation goes on"
    assert read[2][1] == 0, "another model has read nothing of it"
    assert "pair a: org/a, draft none" in ended.err
    assert ended.err.count("error: b is broken.") == 1
    assert ended.err.count("taken back: ") == 3


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
