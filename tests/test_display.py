"""The display on real pseudo-terminals; a terminal emulator says what the screen holds."""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import pyte
import pytest
from cli_tools import wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from wcwidth import wcwidth

from mlxspec.cli.screen import display as display_module
from mlxspec.cli.screen import streams
from mlxspec.cli.screen import waiting as waiting_module
from mlxspec.cli.screen.display import Display, Split, open_display
from mlxspec.cli.screen.summary import Both, live_parts, summary
from mlxspec.metrics import (
    Event,
    FinishReason,
    Generation,
    Piece,
    Progress,
    RoundStats,
    SpeculationStats,
    speed,
)
from mlxspec.params import Penalties, SamplingParams
from mlxspec.parked import Parked

SPLIT = Split(draft=0.14, verify=0.79, host=0.07)
K = 4
STATUS = "40 tok/s · acceptance 75% · 4.0 tokens/round · 0.1 s"  # of the first round
SYNC = "\0"  # never in what a display writes to a terminal


class Screen(pyte.Screen):
    """pyte, with what xterm does at the right edge.

    A cursor that waits to wrap is on the last cell for everything but text, and a wide character
    that does not fit into a row goes to the next.
    """

    def draw(self, data: str) -> None:
        for char in data:
            if wcwidth(char) == 2 and self.cursor.x == self.columns - 1:
                self.cursor.x = self.columns
            super().draw(char)

    def erase_in_display(self, how: int = 0, *args: Any, **kwargs: Any) -> None:
        self._settle()
        super().erase_in_display(how, *args, **kwargs)

    def erase_in_line(self, how: int = 0, private: bool = False) -> None:
        self._settle()
        super().erase_in_line(how, private)

    def cursor_up(self, count: int | None = None) -> None:
        self._settle()
        super().cursor_up(count)

    def _settle(self) -> None:
        self.cursor.x = min(self.cursor.x, self.columns - 1)


class Terminal:
    """A pseudo-terminal of which streams can be opened, and its screen."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self._files = ExitStack()
        self._master, self.slave = os.openpty()
        self.screen = Screen(columns, lines)
        self._parser = pyte.ByteStream(self.screen)
        self.raw = ""
        self.resize(columns, lines)

    def open(self) -> TextIO:
        stream = os.fdopen(os.dup(self.slave), "w", encoding="utf-8")
        return self._files.enter_context(stream)

    def resize(self, columns: int, lines: int) -> None:
        self.read()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def write(self, text: str) -> None:
        """Something else writes: another process, or the echo of a key that was pressed."""
        os.write(self.slave, text.encode())

    def rows(self) -> list[str]:
        self.read()
        return [row.rstrip() for row in self.screen.display]

    def text(self) -> str:
        return "\n".join(self.rows()).rstrip()

    def read(self) -> None:
        os.write(self.slave, SYNC.encode())
        data = b""
        while SYNC.encode() not in data:
            data += os.read(self._master, 65536)
        self.raw += data.decode().replace(SYNC, "")
        self._parser.feed(data)

    def close(self) -> None:
        self._files.close()
        os.close(self.slave)
        os.close(self._master)


class Running:
    """A display, fed piece by piece."""

    def __init__(self, display: Display, *, draft_tokens: int = K) -> None:
        self.display = display
        stats = SpeculationStats(draft_tokens, enabled=draft_tokens > 0)
        self.generation = Generation(prompt_tokens=3, speculation=stats, sampling=SamplingParams())
        self.elapsed_s = 0.0

    def say(
        self,
        text: str,
        *,
        own: bool = False,
        reasoning: bool = False,
        finish: FinishReason | None = None,
    ) -> None:
        accepted = 3 if self.generation.speculation.enabled else None
        stats = None if accepted is None else RoundStats(K, accepted, drafter="draft")
        pieces = (Piece(text, not own, reasoning),) if text else ()
        event = Event((1,) * 4, (not own,) * 4, pieces, stats, finish)
        self.generation.add(event)
        self.elapsed_s += 0.1
        self.display.show(event, self.generation, self.elapsed_s)

    def finish(self, split: Split | None = SPLIT) -> None:
        self.generation.timing.decode_s = self.elapsed_s
        self.generation.timing.time_to_first_token_s = 0.04
        self.generation.peak_gb = 0.031
        self.display.finish(self.generation, split)


MakeTerminal = Callable[..., Terminal]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def make_terminal() -> Iterator[MakeTerminal]:
    with ExitStack() as stack:

        def make(columns: int = 80, lines: int = 24) -> Terminal:
            terminal = Terminal(columns, lines)
            stack.callback(terminal.close)
            return terminal

        yield make


@pytest.fixture
def terminal(make_terminal: MakeTerminal) -> Terminal:
    return make_terminal()


def on(
    terminal: Terminal, *, quiet: bool = False, json: bool = False, draft_tokens: int = K
) -> Running:
    """Both streams on `terminal`."""
    display = open_display(stdout=terminal.open(), stderr=terminal.open(), quiet=quiet, json=json)
    return Running(display, draft_tokens=draft_tokens)


def wrapped(text: str, width: int) -> list[str]:
    """The rows that `text` fills."""
    rows, used = [""], 0
    for char in text:
        if char == "\n":
            rows.append("")
            used = 0
            continue
        column = used % width
        shown = " " * min(8 - column % 8, width - column) if char == "\t" else char
        cells = sum(map(wcwidth, shown))
        if used + cells > width:
            rows.append("")
            used = 0
        rows[-1] += shown
        used += cells
    return [row.rstrip() for row in rows]


# The text on a terminal that also shows the live line


def test_live_line_is_below_the_text_and_gone_at_the_end(terminal: Terminal) -> None:
    run = on(terminal)
    run.say("The quick")
    run.say(" fox", own=True)
    assert terminal.rows()[:3] == [
        "The quick fox",
        "40 tok/s · acceptance 75% · 4.0 tokens/round · 0.2 s",
        "",
    ]
    assert (terminal.screen.cursor.x, terminal.screen.cursor.y) == (13, 0)
    run.say("", finish="length")
    run.finish()
    assert terminal.rows()[:6] == [
        "The quick fox",
        "output    12 tokens in 0.30 s · 40 tok/s · first after 0.04 s · length limit",
        "written   draft 67% · target 33%",
        "rounds    3 rounds · 4.00 tokens per round · 75% of 12 proposals accepted",
        "cost      draft 14% · verify 79% · host 7% of a round · peak memory 0.03 GB",
        "",
    ]
    assert not terminal.screen.cursor.hidden


@given(
    texts=st.lists(st.text("ab. \n\t漢字é─", max_size=24), max_size=14),
    columns=st.integers(4, 24),
    lines=st.sampled_from([2, 3, 5, 60]),
)
@settings(max_examples=400)
def test_screen_is_the_wrapped_text_whatever_the_pieces(
    texts: list[str], columns: int, lines: int
) -> None:
    terminal = Terminal(columns, lines)
    try:
        run = on(terminal)
        for index, text in enumerate(texts):
            run.say(text, own=index % 3 == 0)
            assert_text_above_live_line(terminal, run.generation.text)
        run.display.close()
        text = run.generation.text
        filled = text + ("\n" if text and not text.endswith("\n") else "")
        assert_text_above_live_line(terminal, filled, live=False)
    finally:
        terminal.close()


def assert_text_above_live_line(terminal: Terminal, text: str, *, live: bool = True) -> None:
    rows, cursor = terminal.rows(), terminal.screen.cursor
    expected = wrapped(text, terminal.screen.columns)
    above = rows[: cursor.y + 1]
    assert above == expected[-len(above) :]
    assert len(above) == len(expected) or len(above) >= terminal.screen.lines - 1
    below = rows[cursor.y + 1 :]
    if live and cursor.x < terminal.screen.columns:
        assert below.pop(0)
    assert not any(below)


@pytest.mark.parametrize("after", ["\nnext", "next", "\tnext", "漢"])
@pytest.mark.parametrize("columns", [20, 80])
def test_line_of_exactly_the_width(make_terminal: MakeTerminal, after: str, columns: int) -> None:
    terminal = make_terminal(columns)
    run = on(terminal)
    full = "x" * columns
    run.say(full)
    assert terminal.rows()[0] == full
    run.say(after)
    run.display.close()
    assert terminal.text() == "\n".join(wrapped(full + after, columns))


def test_more_lines_than_the_screen_has(make_terminal: MakeTerminal) -> None:
    terminal = make_terminal(30, 5)
    run = on(terminal)
    for number in range(40):
        run.say(f"line {number}\n")
    assert terminal.rows()[:3] == ["line 37", "line 38", "line 39"]
    assert terminal.rows()[4].startswith("40 tok/s")
    run.display.close()
    assert terminal.rows()[:3] == ["line 37", "line 38", "line 39"]
    assert terminal.rows()[3:] == ["", ""]


def test_narrow_window_shows_the_parts_that_fit(make_terminal: MakeTerminal) -> None:
    terminal = make_terminal(20)
    run = on(terminal)
    run.say("text")
    assert terminal.rows()[1] == "40 tok/s"


@pytest.mark.parametrize("columns", [20, 30, 40, 60])
def test_a_narrow_window_has_all_of_the_summary(make_terminal: MakeTerminal, columns: int) -> None:
    terminal = make_terminal(columns, 40)
    run = on(terminal)
    run.say("text")
    run.finish()
    rows = terminal.rows()
    assert "…" not in "".join(rows)
    labels = [row[:10].strip() for row in rows[1:]]
    assert [label for label in labels if label] == ["output", "written", "rounds", "cost"]
    words = "".join(row[10:] for row in rows[1:]).replace(" ", "")
    for part in ("firstafter0.04s", "interrupted", "75%of4proposalsaccepted", "memory0.03GB"):
        assert part in words


def test_plain_decoding_shows_speed_and_time_alone(terminal: Terminal) -> None:
    run = on(terminal, draft_tokens=0)
    run.say("text", own=True)
    assert terminal.rows()[1] == "40 tok/s · 0.1 s"
    assert "\x1b[1m" not in terminal.raw
    run.say("", finish="stop")
    run.finish(None)
    assert terminal.rows()[1:4] == [
        "output    8 tokens in 0.20 s · 40 tok/s · first after 0.04 s · end of text",
        "cost      peak memory 0.03 GB",
        "",
    ]


def test_a_slow_text_has_its_speed_to_a_tenth(terminal: Terminal) -> None:
    run = on(terminal)
    run.elapsed_s = 2.4
    run.say("text")
    assert terminal.rows()[1].startswith("1.6 tok/s")
    run.say("", finish="length")
    run.finish(None)
    assert " · 3.1 tok/s · " in terminal.rows()[1]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((15, 6, 8), ["history 52%", "prediction 21%", "target 27%"]),
        ((1, 1, 1), ["history 34%", "prediction 33%", "target 33%"]),
        ((1, 0, 199), ["history 1%", "prediction 0%", "target 99%"]),
        ((3, 3, 0), ["history 50%", "prediction 50%", "target 0%"]),
    ],
)
def test_shares_add_up(counts: tuple[int, int, int], expected: list[str]) -> None:
    generation = Generation(8, SpeculationStats(K, auto=True), SamplingParams())
    generation.written_by = dict(zip(("history", "prediction", "target"), counts, strict=True))
    assert dict(summary(generation, None))["written"] == expected


def test_a_last_round_that_is_cut_short_is_said(terminal: Terminal) -> None:
    # It writes tokens, and its proposals are in no rate.
    generation = Generation(8, SpeculationStats(K, auto=True), SamplingParams())
    for stats in (RoundStats(1, 0, drafter="history"), RoundStats(1, 1, False, "history")):
        generation.add(Event((1,), (stats.accepted > 0,), round=stats))
    rows = dict(summary(generation, None))
    assert rows["written"] == ["history 50%", "target 50%"]
    assert rows["rounds"] == [
        "2 rounds, the last cut short",
        "1.00 tokens per round",
        "0% of 1 proposals accepted",
    ]


def test_resize_keeps_the_text(make_terminal: MakeTerminal) -> None:
    terminal = make_terminal(40)
    run = on(terminal)
    run.say("some words")
    terminal.resize(20, 24)
    run.say(" and")
    assert terminal.rows()[:2] == ["some words and", ""]  # the column may be another by now
    run.say(" more\n")
    terminal.resize(30, 24)
    run.say("")
    assert terminal.rows()[:3] == ["some words and more", "", "40 tok/s · acceptance 75%"]
    run.say("a new line")
    assert terminal.rows()[1] == "a new line"


def test_resize_that_reflows_the_text(make_terminal: MakeTerminal) -> None:
    terminal = make_terminal(40)
    run = on(terminal)
    run.say("some words")
    terminal.resize(8, 24)
    terminal.screen.cursor.y, terminal.screen.cursor.x = 1, 2  # as a terminal that reflows does
    run.say("X")
    assert terminal.rows()[1] == "40X"  # pyte left the live line there


def test_echoed_keys_are_overwritten(terminal: Terminal) -> None:
    run = on(terminal)
    run.say("some words")
    terminal.write("xyz")
    run.say(" and more")
    run.display.close()
    assert terminal.text() == "some words and more"


@pytest.mark.parametrize("odd", ["⚠️", "👩\u200d🔬", "🇫🇷", "\u00ad", "\u0903"])
def test_live_line_waits_where_terminals_disagree(terminal: Terminal, odd: str) -> None:
    run = on(terminal)
    run.say(odd)
    run.say(" then")
    assert terminal.rows()[1] == ""
    run.say("\n")
    assert terminal.rows()[2].startswith("40 tok/s")


def test_line_of_unknown_width_is_ended(terminal: Terminal) -> None:
    run = on(terminal)
    run.say("\u200e")
    run.display.close()
    terminal.read()
    assert terminal.raw == "\u200e\r\n"


def test_window_of_one_row_shows_the_text_alone(make_terminal: MakeTerminal) -> None:
    terminal = make_terminal(80, 1)
    on(terminal).say("text")
    assert terminal.rows() == ["text"]


def test_no_rates_before_there_is_something_to_tell(terminal: Terminal) -> None:
    run = on(terminal)
    event = Event((1,), (False,), (Piece("a", from_draft=False),), RoundStats(K, 0, full=False))
    run.generation.add(event)
    run.display.show(event, run.generation, 0.001)
    assert terminal.rows()[1] == "0.0 s"
    run.display.finish(run.generation, None)
    assert terminal.rows()[1:5] == [
        "output    1 token · interrupted",
        "written   target 100%",
        "rounds    1 round",
        "",
    ]


def test_numbers_hold_still_long_enough_to_be_read(terminal: Terminal) -> None:
    run = on(terminal)
    run.say("one")
    before = terminal.rows()[1]
    run.elapsed_s -= 0.05
    run.say(" two")
    assert terminal.rows()[:2] == ["one two", before]


def test_control_characters_are_shown_as_pictures(terminal: Terminal) -> None:
    run = on(terminal)
    run.say("a\x1b[2Jb\rc\x07d\x7fe\x9bf")
    run.display.note("\x1b[2J")
    run.display.close()
    assert terminal.rows()[:2] == ["a␛[2Jb␍c␇d␡e\ufffdf", "␛[2J"]


def test_letters_that_the_terminal_lacks_move_the_cursor_as_what_stands_for_them(
    make_terminal: MakeTerminal,
) -> None:
    streams.prepare()
    terminal = make_terminal(20, 30)
    with os.fdopen(os.dup(terminal.slave), "w", encoding="ascii", errors=streams.ERRORS) as stream:
        run = Running(open_display(stdout=stream, stderr=stream, quiet=False, json=False))
        for text in ("a …", "漢 · é", "x\x1b"):
            run.say(text)
        run.say("!")
        text = "a ...\\u6f22 - \\xe9x\\u241b!"
        assert terminal.rows()[:2] == [text[:20], text[20:]]
        assert terminal.rows()[2].startswith("40 tok/s")
        run.finish()
    assert "75% of" in "".join(terminal.rows())


def test_the_targets_own_text_is_bold(terminal: Terminal) -> None:
    run = on(terminal)
    run.say("draft")
    run.say("own", own=True)
    terminal.read()
    bold = [terminal.screen.buffer[0][column].bold for column in range(8)]
    assert bold == [False] * 5 + [True] * 3


def test_stdout_carries_the_text_and_nothing_else(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stdout, written = terminal.open(), io.StringIO()
    plain_write = stdout.write
    stdout.write = lambda text: written.write(text) and plain_write(text)  # type: ignore[method-assign]
    run = Running(open_display(stdout=stdout, stderr=terminal.open(), quiet=False, json=False))
    for text in ("one ", "x" * 76, "two\nthree", "", " four"):
        run.say(text)
    run.finish()
    assert written.getvalue() == run.generation.text


def test_interrupted_leaves_the_text_and_a_clean_screen(terminal: Terminal) -> None:
    run = on(terminal)
    run.say("some words")
    terminal.write("^C")
    run.finish()
    rows = terminal.rows()
    assert rows[0] == "some words"
    assert rows[1].endswith("· interrupted")
    assert not any("tokens/round" in row for row in rows)
    assert not terminal.screen.cursor.hidden


def test_error_in_the_block_leaves_a_clean_screen(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display_module, "SPINNER_AFTER_S", 0)
    run = on(terminal)
    run.display.prefill(512, 4096)
    terminal.read()
    assert terminal.screen.cursor.hidden
    with pytest.raises(KeyboardInterrupt), run.display:
        raise KeyboardInterrupt
    assert terminal.text() == ""
    assert not terminal.screen.cursor.hidden


@pytest.mark.parametrize(
    ("method", "text", "rows"),
    [("flush", "second", ["first", "second"]), ("write", "second\n", ["first"])],
)
def test_interrupt_while_writing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, method: str, text: str, rows: list[str]
) -> None:
    stdout = terminal.open()
    run = Running(open_display(stdout=stdout, stderr=terminal.open(), quiet=False, json=False))
    run.say("first")
    run.say("\n" * (len(rows) - 1))

    def interrupted(*_: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stdout, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.say(text)
    run.finish()
    after = terminal.rows()
    assert after[: len(rows)] == rows
    assert after[len(rows)].startswith("output    ")
    assert not any("tokens/round" in row for row in after)


def test_second_generation_on_the_same_display(terminal: Terminal) -> None:
    run = on(terminal)
    run.say("one, ")
    run.say("two")
    run.finish()
    again = Running(run.display)
    again.say("three")
    assert terminal.rows()[5:7] == [
        "three",
        "40 tok/s · acceptance 75% · 4.0 tokens/round · 0.1 s",
    ]


# What comes before the text, and notes


def test_spinner_after_a_while_and_then_gone(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    display = on(terminal).display
    with display.status("loading [demo]"):
        pass
    terminal.read()
    assert terminal.raw == ""
    monkeypatch.setattr(waiting_module, "SPINNER_AFTER_S", 0)
    with display.status("loading [demo]"):
        wait_for(lambda: terminal.text().endswith(" loading [demo]"))  # it is drawn by a thread
    assert terminal.text() == ""
    assert not terminal.screen.cursor.hidden


@pytest.mark.parametrize("total", [600, 20_480])
def test_bar_after_a_while_and_then_gone(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, total: int
) -> None:
    display = on(terminal).display
    display.prefill(512, total)
    assert terminal.text() == ""
    monkeypatch.setattr(display_module, "SPINNER_AFTER_S", 0)
    display.prefill(512, total)
    assert terminal.text()[1:].startswith(" reading the prompt")
    assert terminal.text().endswith(f" 512/{total}")
    display.prefill(total, total)
    assert terminal.text() == ""
    assert not terminal.screen.cursor.hidden


def test_bar_for_a_measurement_says_how_long(terminal: Terminal) -> None:
    display = on(terminal).display
    display.measuring(Progress("timing passes", 0, 34))
    display.measuring(Progress("trying on texts", 5, 160, 41.6))
    wait_for(lambda: "5/160" in terminal.text())
    (row,) = filter(None, terminal.rows())
    assert "trying on texts" in row
    assert row.endswith(" 5/160 about 42 s left")
    display.measuring(Progress("trying on texts", 159, 160, 0.2))
    with display.status("building"):  # another wait takes its place
        assert terminal.text() == ""
    display.measuring(Progress("timing passes", 0, 34))
    display.note("a [note]")
    display.close()
    assert terminal.text() == "a [note]"
    assert not terminal.screen.cursor.hidden


def spoken(*, measures: bool, quiet: bool = False) -> tuple[Display, io.StringIO]:
    """A display whose stderr is no terminal, and what it gets."""
    stderr = io.StringIO()
    display = open_display(
        stdout=io.StringIO(), stderr=stderr, quiet=quiet, json=True, measures=measures
    )
    return display, stderr


def test_a_measurement_is_told_in_lines_where_nothing_is_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    display, stderr = spoken(measures=True)
    now_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    for progress, at_s in (
        (Progress("timing a pass of each model", 0, 2), 0),
        (Progress("timing passes", 0, 34, 38.4), 1),
        (Progress("timing passes", 7, 34, 30.0), 10),
        (Progress("timing passes", 17, 34, 12.3), 11),
        (Progress("timing passes", 34, 34, 0.1), 30),
        (Progress("trying on texts", 0, 4, 0.1), 30),
    ):
        now_s[0] = at_s
        display.measuring(progress)
    assert stderr.getvalue().splitlines() == [
        "timing a pass of each model",
        "timing passes: about 38 s left",
        "timing passes: 17 of 34, about 12 s left",
        "trying on texts: about 1 s left",
    ]
    quiet, silence = spoken(measures=True, quiet=True)
    quiet.measuring(progress)
    assert silence.getvalue() == ""


def test_a_wait_is_told_in_a_line_where_that_is_all_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting_module, "SPINNER_AFTER_S", 0)
    for measures, aloud, told in (
        (True, None, "loading\n"),
        (True, False, ""),
        (False, None, ""),
        (False, True, "loading\n"),
    ):
        display, stderr = spoken(measures=measures)
        with display.status("loading", aloud=aloud):
            if told:
                wait_for(stderr.getvalue)
        assert stderr.getvalue() == told
    monkeypatch.setattr(waiting_module, "SPINNER_AFTER_S", 60)
    display, stderr = spoken(measures=True)
    with display.status("loading"):
        pass
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("is_live", [True, False])
def test_a_wait_says_what_it_does_where_that_takes_a_while(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, is_live: bool
) -> None:
    monkeypatch.setattr(waiting_module, "SPINNER_AFTER_S", 0)
    display, stderr = (on(terminal).display, None) if is_live else spoken(measures=True)

    def text() -> str:
        return terminal.text() if stderr is None else stderr.getvalue()

    for after_s in (60, 0):
        monkeypatch.setattr(waiting_module, "DOING_AFTER_S", after_s)
        with display.status("loading") as doing:
            doing("trying [it]")
            if after_s:
                time.sleep(0.1)
                assert "trying" not in text()
            else:
                wait_for(lambda: "loading: trying [it]" in text())


def seconds(terminal: Terminal, behind: str) -> float:
    """The seconds that the screen shows behind some words; 0 where it shows none."""
    found = re.search(rf"{behind} · (\d+\.\d) s", terminal.text())
    return 0.0 if found is None else float(found[1])


def test_something_moves_while_nothing_happens(terminal: Terminal) -> None:
    run = on(terminal)
    with run.display.running():
        wait_for(lambda: seconds(terminal, "reading the prompt") > 0)
        first_s = seconds(terminal, "reading the prompt")
        wait_for(lambda: seconds(terminal, "reading the prompt") > first_s)
        run.say("some words")
        assert "reading" not in terminal.text()
        # The clock of the live line goes on while a round takes its time.
        wait_for(lambda: seconds(terminal, "tokens/round") > 0.1)
        assert "40 tok/s" in terminal.text()
        assert terminal.screen.cursor.x == len("some words")
    run.finish()
    assert terminal.rows()[0] == "some words"
    assert terminal.rows()[1].startswith("output    ")


def test_the_bar_moves_while_a_piece_is_read(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display_module, "SPINNER_AFTER_S", 0)
    display = on(terminal).display
    with display.running():
        display.prefill(128, 512)
        shown = {terminal.text()}
        wait_for(lambda: shown.add(terminal.text()) or len(shown) >= 3)
    assert all(text.endswith(" 128/512") for text in shown)


def test_a_text_that_flows_is_left_alone(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxspec.cli.screen.pulse.QUIET_S", 60)
    run = on(terminal)
    with run.display.running():
        run.say("some words")
        time.sleep(0.3)
        assert terminal.text() == f"some words\n{STATUS}"


def test_note_waits_for_the_end_of_the_line(terminal: Terminal) -> None:
    run = on(terminal)
    run.display.note("early [note]")
    run.say("line\n")
    run.display.note("between")
    run.say("text")
    run.display.note("late")
    assert terminal.rows()[:3] == ["early [note]", "line", "between"]
    assert "late" not in terminal.text()
    run.display.close()
    assert terminal.text() == "early [note]\nline\nbetween\ntext\nlate"


# Colours off, a terminal that can do nothing, quiet, JSON


@pytest.mark.parametrize(
    ("name", "value"), [("NO_COLOR", "1"), ("TERM", "vt100"), ("TERM", "xterm-mono-m")]
)
def test_without_colours_there_are_no_styles(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(display_module, "SPINNER_AFTER_S", 0)
    run = on(terminal)
    run.display.note("note")
    run.display.prefill(512, 2048)
    run.say("text", own=True)
    assert terminal.rows()[:2] == ["note", "text"]
    assert terminal.rows()[2].startswith("40 tok/s")
    run.finish()
    terminal.read()
    sequences = [part.lstrip("?0123456789;")[:1] for part in terminal.raw.split("\x1b[")[1:]]
    assert "m" not in sequences
    assert "J" in sequences


def test_empty_no_color_does_not_count(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    on(terminal).say("text", own=True)
    terminal.read()
    assert "\x1b[1mtext" in terminal.raw


@pytest.mark.parametrize("term", ["dumb", ""])
def test_dumb_terminal_gets_text_and_a_final_line(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    run = on(terminal)
    run.display.note("note")
    run.display.prefill(512, 2048)
    run.say("text", own=True)
    run.finish()
    terminal.read()
    assert "\x1b" not in terminal.raw
    note, text, final = terminal.raw.split("\r\n", 2)
    assert (note, text) == ("note", "text")
    assert final.startswith("output: 4 tokens in 0.10 s · 40 tok/s · first after 0.04 s · ")
    assert final.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "shown"), [(0.04, "0.0"), (7.26, "7.3"), (19.9, "19.9"), (20, "20"), (143.5, "144")]
)
def test_a_slow_speed_has_a_decimal(value: float, shown: str) -> None:
    assert speed(value) == shown
    generation = Generation(1, SpeculationStats(1), SamplingParams())
    generation.tokens, generation.timing.decode_s = [0] * 100, 100 / value
    assert f"{shown} tok/s" in dict(summary(generation, None))["output"]
    assert f"{shown} tok/s" in live_parts(generation, None, 100 / value)


def test_quiet_writes_the_text_alone(terminal: Terminal) -> None:
    run = on(terminal, quiet=True)
    run.display.note("note")
    run.display.prefill(512, 2048)
    with run.display.status("loading"):
        pass
    run.say("text")
    run.finish()
    terminal.read()
    assert terminal.raw == "text\r\n"


def test_json_keeps_stdout_for_the_caller(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "object.json"
    with path.open("w") as stdout:
        display = open_display(stdout=stdout, stderr=terminal.open(), quiet=False, json=True)
        run = Running(display)
        run.say("text")
        assert terminal.text() == "40 tok/s · acceptance 75% · 4.0 tokens/round · 0.1 s"
        run.finish()
    assert terminal.rows()[0].startswith("output    4 tokens")
    assert path.read_text() == ""


# Reasoning beside the answer


def think(run: Running) -> None:
    """Reasoning twice, an answer after each."""
    for text, reasoning in [("Hm", True), (", so", True), ("Yes", False), (", 4", False)]:
        run.say(text, own=True, reasoning=reasoning)
    run.say("\n\nOr", reasoning=True)
    run.say("\n\nNo.")


def test_reasoning_is_dim_above_the_answer(terminal: Terminal) -> None:
    run = on(terminal)
    think(run)
    run.finish()
    assert terminal.rows()[:7] == ["Hm, so", "", "Yes, 4", "", "Or", "", "No."]
    assert terminal.rows()[7].startswith("output")
    styled = terminal.raw
    assert "\x1b[2mHm" in styled
    assert "\x1b[2m, so" in styled
    assert "\x1b[1mYes" in styled
    assert "left out" not in terminal.text()


TAGGED = "<think>\nHm, so\n</think>\n\nYes, 4\n\n<think>\nOr\n</think>\n\nNo."


def test_where_no_style_tells_them_apart_tags_do(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    run = on(terminal)
    think(run)
    run.finish()
    assert terminal.text().startswith(TAGGED + "\noutput")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, "Yes, 4\n\nNo."), (False, "Yes, 4\n\nNo."), (True, TAGGED)],
)
def test_what_reads_a_file_gets_the_answer_unless_asked(
    tmp_path: Path, asked: bool | None, expected: str
) -> None:
    stderr = io.StringIO()
    with (tmp_path / "text").open("w") as stdout:
        run = Running(
            open_display(stdout=stdout, stderr=stderr, quiet=False, json=False, reasoning=asked)
        )
        think(run)
        run.finish()
    assert (tmp_path / "text").read_text() == expected
    # Who did not ask for it is told where it is.
    assert ("--show-reasoning" in stderr.getvalue()) == (asked is None)


def test_reasoning_may_be_hidden_on_a_terminal(terminal: Terminal) -> None:
    display = open_display(
        stdout=terminal.open(), stderr=terminal.open(), quiet=True, json=False, reasoning=False
    )
    run = Running(display)
    think(run)
    display.close()
    run.say("Hm", reasoning=True)
    run.say("Next")
    run.finish()
    assert terminal.text() == "Yes, 4\n\nNo.\nNext"


# stdout or stderr elsewhere

EXACT = "one\r\n\x1b[1mtwo\ttabs 漢字\x00\n\nthree"


def test_file_gets_the_exact_text_and_the_terminal_the_rest(
    terminal: Terminal, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    with path.open("w", encoding="utf-8", newline="") as stdout:
        display = open_display(stdout=stdout, stderr=terminal.open(), quiet=False, json=False)
        run = Running(display)
        for char in EXACT:
            run.say(char, own=True)
            assert path.read_bytes() == run.generation.text.encode()
            assert terminal.rows()[1] == ""
        assert terminal.rows()[0].startswith("40 tok/s · acceptance 75%")
        run.display.note("note")
        assert terminal.text() == "note"
        run.finish()
    assert terminal.rows()[1].startswith("output    ")
    assert terminal.text().count("\n") == 4
    assert path.read_bytes() == EXACT.encode()


def test_pipe_gets_the_exact_text_and_nothing_moves_the_cursor(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    read, write = os.pipe()
    with os.fdopen(write, "w", encoding="utf-8", newline="") as stdout:
        display = open_display(stdout=stdout, stderr=terminal.open(), quiet=False, json=False)
        run = Running(display)
        for char in EXACT:
            run.say(char, own=True)
        assert terminal.text() == ""
        # As `tee` would.
        terminal.write("three")
        run.finish()
    assert terminal.rows()[0] == "three"
    assert terminal.rows()[1].startswith("output    ")
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == EXACT.encode()


def test_stderr_elsewhere_gets_one_final_line(terminal: Terminal) -> None:
    stderr = io.StringIO()
    display = open_display(stdout=terminal.open(), stderr=stderr, quiet=False, json=False)
    run = Running(display)
    with display.status("loading"):
        display.prefill(512, 2048)
    run.say("text ")
    run.say("own", own=True)
    assert stderr.getvalue() == ""
    run.finish()
    terminal.read()
    assert terminal.raw == "text \x1b[1mown\x1b[0m\r\n"
    assert stderr.getvalue() == (
        "output: 8 tokens in 0.20 s · 40 tok/s · first after 0.04 s · interrupted; "
        "written: draft 50% · target 50%; "
        "rounds: 2 rounds · 4.00 tokens per round · 75% of 8 proposals accepted; "
        "cost: draft 14% · verify 79% · host 7% of a round · peak memory 0.03 GB\n"
    )


def test_two_terminals(make_terminal: MakeTerminal) -> None:
    one, other = make_terminal(), make_terminal()
    display = open_display(stdout=one.open(), stderr=other.open(), quiet=False, json=False)
    run = Running(display)
    run.say("text")
    assert other.text().startswith("40 tok/s")
    run.finish()
    one.read()
    assert one.raw == "text\r\n"
    assert other.rows()[0].startswith("output    ")


def test_nothing_was_generated() -> None:
    stderr = io.StringIO()
    run = Running(open_display(stdout=io.StringIO(), stderr=stderr, quiet=False, json=False))
    run.display.finish(run.generation, None)
    assert stderr.getvalue() == "output: 0 tokens · interrupted\n"


def test_closed_pipe_ends_show_alone() -> None:
    read, write = os.pipe()
    os.close(read)
    stdout, stderr = os.fdopen(write, "w"), io.StringIO()
    run = Running(open_display(stdout=stdout, stderr=stderr, quiet=False, json=False))
    with pytest.raises(BrokenPipeError):
        run.say("text")
    run.finish()
    assert stderr.getvalue().startswith("output: 4 tokens")
    with pytest.raises(BrokenPipeError):
        stdout.close()


def test_closed_streams_do_not_make_finish_raise(terminal: Terminal) -> None:
    stdout, stderr = terminal.open(), terminal.open()
    run = Running(open_display(stdout=stdout, stderr=stderr, quiet=False, json=False))
    run.say("text")
    run.display.note("note")
    stdout.close()
    stderr.close()
    run.finish()


# --- what a controller does -------------------------------------------------------------


def auto_of(*rounds: RoundStats) -> Generation:
    stats = SpeculationStats(8, auto=True)
    generation = Generation(prompt_tokens=3, speculation=stats, sampling=SamplingParams())
    for one in rounds:
        tokens = (1,) * (one.accepted + 1)
        proposed = (True,) * one.accepted + (False,)
        generation.add(Event(tokens, proposed, (), one))
    return generation


PARKED = RoundStats(0, 0, parked=Parked(0.083, 64))
DRAFTING = RoundStats(3, 2, drafter="model")


@pytest.mark.parametrize(
    ("latest", "expected"),
    [
        (DRAFTING, "model drafts 3"),
        (PARKED, "parked: speculation was losing 8%, retry in 64 rounds"),
        (
            RoundStats(0, 0, parked=Parked(0.4, 9, texts=4, draft_tokens=3, cost=2.9, brings=1.8)),
            "parked: 4 texts at a time: proposing costs more than it brings (a round of 3 "
            "proposals takes 2.9 x a plain one and brings 1.8 x), retry in 9 rounds",
        ),
        (RoundStats(0, 0), "nothing drafted"),
    ],
)
def test_the_live_line_tells_what_is_chosen(latest: RoundStats, expected: str) -> None:
    assert expected in live_parts(auto_of(DRAFTING, latest), latest, 1.0)
    fixed = Generation(prompt_tokens=3, speculation=SpeculationStats(3), sampling=SamplingParams())
    assert expected not in live_parts(fixed, latest, 1.0)


def test_the_summary_tells_who_wrote_the_text() -> None:
    history = RoundStats(15, 15, drafter="history")
    generation = auto_of(*[RoundStats(0, 0)] * 4, *[DRAFTING] * 3, history)
    rows = dict(summary(generation, None))
    # 4 rounds write 1 token each, 3 write 2 of 3 proposed and one of the target, one writes 16.
    assert rows["written"] == ["history 52%", "model 21%", "target 27%"]
    assert rows["rounds"] == [
        "8 rounds",
        "3.62 tokens per round",
        "88% of 24 proposals accepted",
    ]


def test_a_run_that_never_drafted_is_summed_up() -> None:
    rows = dict(summary(auto_of(PARKED, PARKED), None))
    assert rows["written"] == ["target 100%"]
    assert rows["rounds"] == ["2 rounds", "1.00 tokens per round"]


def test_the_summary_names_how_tokens_were_chosen() -> None:
    generation = auto_of(DRAFTING)
    assert "sampling" not in dict(summary(generation, None))
    penalties = Penalties(repetition=1.1, repetition_context=64)
    generation.sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=7, penalties=penalties)
    assert dict(summary(generation, None))["sampling"] == [
        "temperature 0.8",
        "top p 0.95",
        "repetition penalty 1.1",
        "seed 7",
    ]


def test_the_summary_compares_with_plain_decoding() -> None:
    fast, slow = auto_of(DRAFTING, DRAFTING), auto_of(*[PARKED] * 6)
    fast.timing.decode_s, slow.timing.decode_s = 0.1, 0.2
    assert dict(summary(fast, None, Both(fast, slow)))["compared"] == [
        "60 tok/s with speculation",
        "30 tok/s without",
        "2.00 x",
        "the same text",
    ]
    slow.tokens[-1] = 2
    assert dict(summary(fast, None, Both(fast, slow)))["compared"][-1] == "another text"
