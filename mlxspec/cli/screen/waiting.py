"""Words for waits: a spinner or a bar on a terminal, plain lines where stderr is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import Timer

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.status import Status
from rich.text import Text

from mlxspec.cli.screen.terminal import ASIDE, GONE, visible
from mlxspec.metrics import Progress, Tell

SPINNER_AFTER_S = 0.3
DOING_AFTER_S = 1.0
LINES_EVERY_S = 10.0  # about one part of a measurement


class Waiting:
    """What a person is told of waits: nothing, unless a subclass says otherwise."""

    @contextmanager
    def status(
        self, message: str, *, timed: bool = False, aloud: bool | None = None
    ) -> Iterator[Tell]:
        """Say `message` while the block runs, unless that is over in no time.

        The block may say what it does from then on, which is added if it takes a while.

        Args:
            timed: it counts seconds, where that can be seen.
            aloud: whether it is worth a line where nothing is live; None leaves that to the
                command.
        """
        yield lambda doing: None

    def told(self, message: str) -> AbstractContextManager[object]:
        """Say `message` while the block runs, unless that shows something live itself."""
        return nullcontext()

    def show(self, progress: Progress) -> None:
        """Show how far a measurement is."""

    def end(self) -> None:
        """Take away what is live. May be called at any time. Never raises."""


class LiveWaiting(Waiting):
    """A spinner, or a bar with the time that is left, on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Bars | None = None

    @contextmanager
    def status(
        self, message: str, *, timed: bool = False, aloud: bool | None = None
    ) -> Iterator[Tell]:
        spinner = _spinner(self._console, Text(visible(message)), timed=timed)
        timers = [_after(SPINNER_AFTER_S, spinner.start)]

        def more(doing: str) -> None:
            words = Text(visible(f"{message}: {doing}"))
            timers.append(_after(DOING_AFTER_S, lambda: _reword(spinner, words)))

        try:
            yield more
        finally:
            _ended(timers)
            with suppress(*GONE):
                spinner.stop()

    def show(self, progress: Progress) -> None:
        if self._bars is None:
            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}", style=ASIDE),
                console=self._console,
                transient=True,
                # Rich would write to the terminal what is meant for a file.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._bars.add_task("", left="")
            with suppress(*GONE):
                self._bars.start()
        self._bars.update(
            self._bars.task_ids[0],
            description=" · ".join(filter(None, (progress.what, progress.detail))),
            completed=progress.done,
            total=progress.total,
            left=_left(progress.left_s),
        )

    def end(self) -> None:
        if self._bars is not None:
            with suppress(*GONE):
                self._bars.stop()
            self._bars = None


class SpokenWaiting(Waiting):
    """Plain lines.

    Args:
        everything: whether a wait of which nothing is known is worth a line.
    """

    def __init__(self, console: Console, *, everything: bool) -> None:
        self._console = console
        self._everything = everything
        self._part, self._due_s = "", 0.0

    @contextmanager
    def status(
        self, message: str, *, timed: bool = False, aloud: bool | None = None
    ) -> Iterator[Tell]:
        if not (self._everything if aloud is None else aloud):
            yield lambda doing: None
            return
        timers = [_after(SPINNER_AFTER_S, lambda: self._say(message))]

        def more(doing: str) -> None:
            line = f"{message}: {doing}"
            timers.append(_after(DOING_AFTER_S, lambda: self._say(line)))

        try:
            yield more
        finally:
            _ended(timers)

    def told(self, message: str) -> AbstractContextManager[object]:
        return self.status(message)

    def show(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if progress.what != self._part:
            self._part, self._due_s = progress.what, now_s
            self._due_s += 0 if self._everything else SPINNER_AFTER_S
        elif progress.done == progress.total:
            return
        if now_s < self._due_s:
            return
        far = f"{progress.done} of {progress.total}" if progress.done else ""
        parts = ", ".join(filter(None, (far, progress.detail, _left(progress.left_s))))
        self._due_s = now_s + LINES_EVERY_S
        self._say(f"{progress.what}: {parts}" if parts else progress.what)

    def _say(self, line: str) -> None:
        with suppress(*GONE):
            self._console.print(Text(visible(line), ASIDE), soft_wrap=True)


def _left(left_s: float | None) -> str:
    return "" if left_s is None else f"about {max(left_s, 1):.0f} s left"


def _after(seconds: float, then: Callable[[], None]) -> Timer:
    timer = Timer(seconds, then)
    timer.daemon = True
    timer.start()
    return timer


def _ended(timers: list[Timer]) -> None:
    for timer in timers:
        timer.cancel()
        timer.join()


def _reword(spinner: Status | Bars, words: Text) -> None:
    if isinstance(spinner, Status):
        spinner.update(words)
    else:
        spinner.update(spinner.task_ids[0], description=words.plain)


def _spinner(console: Console, message: Text, *, timed: bool) -> Status | Bars:
    if not timed:
        return console.status(message)
    spinner = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    spinner.add_task(message.plain)
    return spinner
