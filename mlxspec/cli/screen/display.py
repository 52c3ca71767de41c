"""Shows a generation as it happens: the text on stdout, everything for people on stderr.

Where both are one terminal, a live line is kept below the text as it grows. A stdout that is not
a terminal gets the text exactly; a stderr that is not a terminal gets one final line.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from math import inf
from threading import RLock
from time import monotonic
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from mlxspec.cli.screen.pulse import Pulse
from mlxspec.cli.screen.reasoning import Layout, Shown
from mlxspec.cli.screen.streams import has_colours, is_capable
from mlxspec.cli.screen.summary import STATUS_EVERY_S, Both, live_parts, speculates, summary
from mlxspec.cli.screen.terminal import (
    ASIDE,
    GONE,
    ExactText,
    LineAlone,
    LineBelow,
    LiveLine,
    TerminalText,
    TextOut,
    columns_of,
    visible,
)
from mlxspec.cli.screen.waiting import SPINNER_AFTER_S, LiveWaiting, SpokenWaiting, Waiting
from mlxspec.metrics import Event, Generation, Progress, Split, Tell


class Display:
    """Shows a generation while it runs; `open_display` makes one.

    As a context manager it leaves the terminal clean however the block ends. Only `show` raises,
    and only when stdout cannot be written to.
    """

    def __init__(
        self,
        *,
        text: TextOut,
        line: LiveLine,
        waiting: Waiting,
        people: Console | None,
        terminal: bool,
        reasoning: Shown = Shown.LEFT_OUT,
    ) -> None:
        self._text = text
        self._layout = Layout(reasoning)
        self._line = line
        self._waiting = waiting
        self._people = people
        self._terminal = terminal
        self._lock = RLock()  # the pulse draws from a thread of its own
        self._pulse: Pulse | None = None
        self._progress: Bars | None = None
        self._begun_s = monotonic()
        self._elapsed_s = 0.0
        self._status: list[str] = []
        self._status_s = -inf
        self._notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def status(
        self, message: str, *, timed: bool = False, aloud: bool | None = None
    ) -> AbstractContextManager[Tell]:
        """Say `message` while a block runs; see `Waiting.status`."""
        self._waiting.end()
        return self._waiting.status(message, timed=timed, aloud=aloud)

    def told(self, message: str) -> AbstractContextManager[object]:
        """Say `message` while a block runs that shows something live itself."""
        return self._waiting.told(message)

    def follow(self, steps: Iterable[Progress]) -> bool:
        """Show a measurement to its end; True where a person ended it."""
        try:
            for progress in steps:
                self.measuring(progress)
        except KeyboardInterrupt:
            return True
        finally:
            self._waiting.end()
        return False

    def measuring(self, progress: Progress) -> None:
        """Show how far a measurement is: a bar on a terminal, a line now and then elsewhere."""
        self._waiting.show(progress)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs, something moves on a terminal, also where no event comes."""
        self._begun_s = monotonic()
        if not self._terminal:
            yield
            return
        with Pulse(self._beat) as self._pulse:
            try:
                yield
            finally:
                self._pulse = None

    def note(self, message: str) -> None:
        """One line for people. It waits for the end of a line of text that it would cut."""
        with self._lock:
            self._notes.append(message)
            if not self._text.in_line:
                self._tell_notes()

    def show(self, event: Event, generation: Generation, elapsed_s: float) -> None:
        """Write the event's text, or show how far the prompt is read.

        `generation` has the event added already. `elapsed_s` counts from the end of prefill.
        """
        with self._lock:
            if self._pulse is not None:
                self._pulse.happened()
            if event.prefill is not None:
                self.prefill(*event.prefill)
                return
            self._end_progress()
            self._line.make_way()
            self._text.write(self._layout.laid_out(event.pieces), marked=speculates(generation))
            self._elapsed_s = elapsed_s
            if elapsed_s - self._status_s >= STATUS_EVERY_S:
                parts = live_parts(generation, event.round, elapsed_s)
                self._status, self._status_s = parts, elapsed_s
            self._line.draw(self._status)
            for note in event.notes:
                self.note(note)

    def prefill(self, read: int, total: int) -> None:
        """`read` of the prompt's `total` tokens are read: a bar where that takes a while."""
        if self._people is None or not self._terminal:
            return
        if read >= total:
            self._end_progress()
            return
        if self._progress is None:
            if monotonic() < self._begun_s + SPINNER_AFTER_S:
                return
            self._line.erase()
            self._progress = _progress(self._people)
            self._progress.add_task("reading the prompt", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=read, refresh=True)

    def _beat(self, quiet_s: float) -> None:
        """Show that time passes; `quiet_s` is how long nothing else has moved."""
        with self._lock, suppress(*GONE):
            if self._progress is not None:
                self._progress.refresh()
            elif self._status:
                self._line.draw([*self._status[:-1], f"{self._elapsed_s + quiet_s:.1f} s"])
            else:
                self._line.draw(["reading the prompt", f"{monotonic() - self._begun_s:.1f} s"])

    def finish(self, generation: Generation, split: Split | None, both: Both | None = None) -> None:
        """End the text and sum it up. Never raises."""
        with self._lock:
            self.close()
        if self._people is None:
            return
        left_out = self._layout.shown is Shown.LEFT_OUT
        rows = summary(generation, split, both, left_out=left_out)
        with suppress(*GONE):
            if self._terminal:
                self._people.width = columns_of(self._people.file)
                self._people.print(table_of(rows))
            else:
                line = "; ".join(f"{label}: {' · '.join(parts)}" for label, parts in rows)
                self._people.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """Take away everything that is live. May be called at any time, and again. Never raises."""
        with self._lock:
            self._end_progress()
            self._waiting.end()
            for clean_up in (self._text.flush, self._line.erase, self._text.end):
                with suppress(*GONE):
                    clean_up()
            self._tell_notes()
            self._layout.reset()
            self._status_s = -inf

    def _tell_notes(self) -> None:
        if self._people is not None and self._notes:
            with suppress(*GONE):
                self._line.erase()
                for note in self._notes:
                    self._people.print(Text(visible(note), ASIDE), soft_wrap=True)
        self._notes.clear()

    def _end_progress(self) -> None:
        if self._progress is not None:
            with suppress(*GONE):
                self._progress.stop()
            self._progress = None


def open_display(
    *,
    stdout: TextIO,
    stderr: TextIO,
    quiet: bool,
    json: bool,
    measures: bool = False,
    reasoning: bool | None = None,
    writer: type[TerminalText] = TerminalText,
) -> Display:
    """The display that fits what the two streams are.

    Args:
        quiet: nothing on stderr.
        json: nothing on stdout, which the caller keeps for an object.
        measures: waits are all that there is to see, so each is told where nothing is live too.
        reasoning: whether stdout shows it beside the answer; None where stdout is a terminal.
        writer: writes the text where a live line is below it.
    """
    colours = has_colours()
    terminal = stderr.isatty() and is_capable() and not quiet
    text, line = TextOut(), LiveLine()
    if terminal and (json or not _is_pipe(stdout)):
        # What reads a pipe, `tee` for one, may write to this very terminal: nothing may then
        # move its cursor.
        line = LineAlone(stderr, colours)
    if not json and not stdout.isatty():
        text = ExactText(stdout, stderr if terminal and _is_pipe(stdout) else None)
    elif not json and terminal and _same_file(stdout, stderr):
        text = below = writer(stdout, end_on=stderr, colours=colours)
        line = LineBelow(stderr, below, colours)
    elif not json:
        text = TerminalText(stdout, end_on=stdout, colours=colours)
    people = None if quiet else _console(stderr, terminal=terminal, colours=colours)
    waiting = Waiting()
    if people is not None:
        spoken = SpokenWaiting(people, everything=measures)
        waiting = LiveWaiting(people) if terminal else spoken
    shown = Shown.on(terminal=stdout.isatty(), colours=colours, asked=json or reasoning)
    return Display(
        text=text,
        line=line,
        waiting=waiting,
        people=people,
        terminal=terminal,
        reasoning=shown,
    )


def table_of(rows: Iterable[tuple[str, list[str]]]) -> Table:
    """Labels, each with the parts of its line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=len("sampling"))  # the longest label, so that summaries line up
    table.add_column(overflow="fold")
    for label, parts in rows:
        table.add_row(Text(label, ASIDE), Text(" · ".join(parts)))
    return table


def _progress(console: Console) -> Bars:
    # The pulse turns the spinner where a piece of the prompt takes a while.
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Bars(*columns, console=console, transient=True, auto_refresh=False)


def _console(stream: TextIO, *, terminal: bool, colours: bool) -> Console:
    return Console(
        file=stream,
        force_terminal=terminal,
        color_system="auto" if terminal and colours else None,
        highlight=False,
    )


def _same_file(one: TextIO, other: TextIO) -> bool:
    with suppress(*GONE):
        return os.path.sameopenfile(one.fileno(), other.fileno())
    return False


def _is_pipe(stream: TextIO) -> bool:
    with suppress(*GONE):
        mode = os.fstat(stream.fileno()).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    return False
